"""A norm in evaluation, folded into CE: x = a z + b, so the moments follow from those of z; M x = (M a) z + M b.

``Unfolded`` has the same methods for CE without a norm before it: nothing else asks which of the two it is.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class EvalNorm(NamedTuple):
    """What a BatchNorm in evaluation computes with."""

    running_mean: Tensor  # (C,)
    running_var: Tensor  # (C,)
    weight: Optional[Tensor]  # (C,), or None without affine
    bias: Optional[Tensor]
    eps: float

    @classmethod
    def of(cls, norm: _BatchNorm) -> EvalNorm:
        """Take them from a BatchNorm."""
        return cls(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


class Unfolded:
    """No norm: z is x."""

    @property
    def saved(self) -> tuple[Optional[Tensor], ...]:
        """The tensors that ``restored`` needs."""
        return (None,) * 4

    def mean(self, z_mean: Tensor) -> Tensor:
        """Return the means of x, (..., G, d), from those of z."""
        return z_mean

    def variance(self, z_variance: Tensor) -> Tensor:
        """Return the variances of x, (N, G, d), from those of z."""
        return z_variance

    def covariance(self, z_covariance: Tensor) -> Tensor:
        """Return the covariance of x, (G, d, d), from that of z."""
        return z_covariance

    def fold(self, matrix: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """Return what z is multiplied with, (N, G, d, d), and what is added, (N, G, d) or None, for M x."""
        return matrix, None

    def fold_backward(self, matrix: Tensor, d_folded: Tensor, d_constant: Optional[Tensor]) -> Tensor:
        """Return dM from the gradients of the two."""
        return d_folded

    def variance_backward(self, z_variance: Tensor, d_variance: Tensor) -> Tensor:
        """Return the gradient of the variances of z, (N, G, d), from that of x's."""
        return d_variance

    def covariance_backward(self, z_covariance: Tensor, d_covariance: Tensor, share: float) -> Tensor:
        """Return the gradient of the covariance of z, (G, d, d), from that of x's.

        Args:
            z_covariance: (G, d, d), of z.
            d_covariance: (G, d, d), of x.
            share: This process's part of a gradient that all processes compute alike.
        """
        return d_covariance

    def gradients(self) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """Return the gradients of the norm's weight and bias that the methods above have gathered."""
        return None, None


class Folded(Unfolded):
    """A norm x = a z + b.

    Args:
        running_mean: (G, d).
        rstd: (G, d), its reciprocal deviation.
        a: (G, d).
        b: (G, d).
        has_weight: Whether it has a weight and a bias, which gradients are asked of.
    """

    def __init__(self, running_mean: Tensor, rstd: Tensor, a: Tensor, b: Tensor, has_weight: bool) -> None:
        self.running_mean, self.rstd, self.a, self.b = running_mean, rstd, a, b
        self.has_weight = has_weight
        self.d_a = self.d_b = None

    @classmethod
    def of(cls, norm: EvalNorm, group_size: int, dtype: torch.dtype) -> Folded:
        """Fold a norm into groups of ``group_size`` channels, computed in ``dtype``."""
        mean, variance, weight, bias = (None if t is None else t.to(dtype).view(-1, group_size) for t in norm[:4])
        rstd = torch.rsqrt(variance + norm.eps)
        if weight is None:
            return cls(mean, rstd, rstd, -mean * rstd, False)
        a = weight * rstd
        return cls(mean, rstd, a, torch.addcmul(bias, mean, a, value=-1), True)

    @property
    def saved(self) -> tuple[Optional[Tensor], ...]:  # noqa: D102, for the methods of this class see Unfolded
        return self.running_mean, self.rstd, self.a, self.b

    def mean(self, z_mean: Tensor) -> Tensor:  # noqa: D102
        return torch.addcmul(self.b, self.a, z_mean)

    def variance(self, z_variance: Tensor) -> Tensor:  # noqa: D102
        return z_variance * self.a.square()

    def covariance(self, z_covariance: Tensor) -> Tensor:  # noqa: D102
        return self.a[:, :, None] * z_covariance * self.a[:, None, :]

    def fold(self, matrix: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return matrix * self.a[:, None, :], (matrix @ self.b[:, :, None])[..., 0]

    def fold_backward(self, matrix: Tensor, d_folded: Tensor, d_constant: Tensor) -> Tensor:  # noqa: D102
        d_constant = d_constant[..., None]
        self.d_a = (matrix * d_folded).sum((0, 2))
        self.d_b = (matrix * d_constant).sum((0, 2))
        return torch.addcmul(d_folded * self.a[:, None, :], d_constant, self.b[:, None, :])

    def variance_backward(self, z_variance: Tensor, d_variance: Tensor) -> Tensor:  # noqa: D102
        d_variance = self.a * d_variance
        self.d_a.add_((z_variance * d_variance).sum(0), alpha=2)
        return self.a * d_variance

    def covariance_backward(self, z_covariance: Tensor, d_covariance: Tensor, share: float) -> Tensor:  # noqa: D102
        d_covariance = d_covariance * self.a[:, None, :]
        self.d_a.add_((d_covariance * z_covariance).sum(2), alpha=2 * share)
        return self.a[:, :, None] * d_covariance

    def gradients(self) -> tuple[Optional[Tensor], Optional[Tensor]]:  # noqa: D102
        if not self.has_weight:
            return None, None
        d_weight = torch.addcmul(self.d_a, self.running_mean, self.d_b, value=-1) * self.rstd
        return d_weight.flatten(), self.d_b.flatten()


def restored(saved: list[Optional[Tensor]], has_weight: bool) -> tuple[Unfolded, list[Optional[Tensor]]]:
    """Return the norm of the forward pass from the first of the saved tensors, and the others."""
    of_norm, rest = saved[:4], saved[4:]
    return Unfolded() if of_norm[0] is None else Folded(*of_norm, has_weight), rest
