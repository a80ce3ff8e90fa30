"""A norm in evaluation, folded into CE: x = a z + b, so the moments follow from those of z; M x = (M a) z + M b."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .precision import matmul
from .records import Inputs, Saved


def affine(inputs: Inputs, eps: float, group_size: int) -> tuple[Optional[Tensor], ...]:
    """Return the norm's reciprocal deviation, a and b, (G, d); without a norm None for each."""
    if inputs.norm_running_mean is None:
        return None, None, None
    mean, variance, weight, bias = (None if t is None else t.view(-1, group_size) for t in inputs[:4])
    rstd = torch.rsqrt(variance + eps)
    a = rstd if weight is None else weight * rstd
    return rstd, a, -mean * a if bias is None else torch.addcmul(bias, mean, a, value=-1)


def fold(matrix: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return what z is multiplied with, (N, G, d, d), and what is added, (N, G, d), for M x."""
    return matrix * a[:, None, :], matmul(matrix, b[:, :, None])[..., 0]


def fold_backward(saved: Saved, d_folded: Tensor, d_constant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of M, a and b from those of the two."""
    d_constant = d_constant[..., None]
    d_matrix = torch.addcmul(d_folded * saved.a[:, None, :], d_constant, saved.b[:, None, :])
    return d_matrix, (saved.matrix * d_folded).sum((0, 2)), (saved.matrix * d_constant).sum((0, 2))


def moments_backward(
    saved: Saved, d_a: Tensor, d_variance: Tensor, d_covariance: Optional[Tensor], share: float
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Return the gradient of a, to which the moments of x add, and the gradients of the moments of z.

    Args:
        saved: Of the forward pass.
        d_a: Through M alone, (G, d).
        d_variance: Of x, (N, G, d).
        d_covariance: Of x, (G, d, d); None in evaluation.
        share: This process's part of the gradient of the covariance, which all processes compute alike.
    """
    d_variance = saved.a * d_variance
    d_a = torch.add(d_a, (saved.z_variance * d_variance).sum(0), alpha=2)
    if d_covariance is not None:
        d_covariance = d_covariance * saved.a[:, None, :]
        d_a = torch.add(d_a, (d_covariance * saved.z_covariance).sum(2), alpha=2 * share)
        d_covariance = saved.a[:, :, None] * d_covariance
    return d_a, saved.a * d_variance, d_covariance


def affine_backward(saved: Saved, inputs: Inputs, d_a: Tensor, d_b: Tensor) -> tuple[Optional[Tensor], ...]:
    """Return the gradients of the norm's weight and bias, (C,), or None where it has none."""
    if inputs.norm_weight is None:
        return None, None
    d_weight = torch.addcmul(d_a, inputs.norm_running_mean.view_as(d_a), d_b, value=-1) * saved.rstd
    return d_weight.flatten(), d_b.flatten()
