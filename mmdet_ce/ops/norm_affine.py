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

    def mean(self, mean: Tensor) -> Tensor:
        """Return the means of x, (..., G, d), from those of z."""
        return mean

    def variance(self, variance: Tensor) -> Tensor:
        """Return the variances of x, (N, G, d), from those of z."""
        return variance

    def covariance(self, covariance: Tensor) -> Tensor:
        """Return the covariance of x, (G, d, d), from that of z."""
        return covariance

    def fold(self, matrix: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """Return what z is multiplied with, (N, G, d, d), and what is added, (N, G, d) or None, for M x."""
        return matrix, None

    def fold_backward(self, matrix: Tensor, d_folded: Tensor, d_constant: Optional[Tensor]) -> Tensor:
        """Return dM from the gradients of the two."""
        return d_folded

    def variance_backward(self, variance: Tensor, d_variance: Tensor) -> Tensor:
        """Return the gradient of the variances of z, (N, G, d), from that of x's; ``variance`` is that of z."""
        return d_variance

    def covariance_backward(self, covariance: Tensor, d_covariance: Tensor, share: float) -> Tensor:
        """Return the gradient of the covariance of z, (G, d, d), from that of x's; ``covariance`` is that of z.

        Args:
            covariance: (G, d, d), of z.
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
        norm: The norm.
        group_size: Channels d of a group.
        dtype: The dtype to compute in.
    """

    def __init__(self, norm: EvalNorm, group_size: int, dtype: torch.dtype) -> None:
        self.has_weight = norm.weight is not None
        self.running_mean = norm.running_mean.to(dtype).view(-1, group_size)
        self.rstd = torch.rsqrt(norm.running_var.to(dtype) + norm.eps).view(-1, group_size)
        if self.has_weight:
            self.a = norm.weight.to(dtype).view(-1, group_size) * self.rstd
            self.b = torch.addcmul(norm.bias.to(dtype).view(-1, group_size), self.running_mean, self.a, value=-1)
        else:
            self.a = self.rstd
            self.b = -self.running_mean * self.a
        self.d_a = self.d_b = None

    def mean(self, mean: Tensor) -> Tensor:  # noqa: D102, for the methods of this class see Unfolded
        return torch.addcmul(self.b, self.a, mean)

    def variance(self, variance: Tensor) -> Tensor:  # noqa: D102
        return variance * self.a.square()

    def covariance(self, covariance: Tensor) -> Tensor:  # noqa: D102
        return self.a[:, :, None] * covariance * self.a[:, None, :]

    def fold(self, matrix: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return matrix * self.a[:, None, :], (matrix @ self.b[:, :, None])[..., 0]

    def fold_backward(self, matrix: Tensor, d_folded: Tensor, d_constant: Tensor) -> Tensor:  # noqa: D102
        d_constant = d_constant[..., None]
        self.d_a = (matrix * d_folded).sum((0, 2))
        self.d_b = (matrix * d_constant).sum((0, 2))
        return torch.addcmul(d_folded * self.a[:, None, :], d_constant, self.b[:, None, :])

    def variance_backward(self, variance: Tensor, d_variance: Tensor) -> Tensor:  # noqa: D102
        d_variance = self.a * d_variance
        self.d_a.add_((variance * d_variance).sum(0), alpha=2)
        return self.a * d_variance

    def covariance_backward(self, covariance: Tensor, d_covariance: Tensor, share: float) -> Tensor:  # noqa: D102
        d_covariance = d_covariance * self.a[:, None, :]
        self.d_a.add_((d_covariance * covariance).sum(2), alpha=2 * share)
        return self.a[:, :, None] * d_covariance

    def gradients(self) -> tuple[Optional[Tensor], Optional[Tensor]]:  # noqa: D102
        if not self.has_weight:
            return None, None
        d_weight = torch.addcmul(self.d_a, self.running_mean, self.d_b, value=-1) * self.rstd
        return d_weight.flatten(), self.d_b.flatten()
