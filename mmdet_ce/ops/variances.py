"""What ``covariances`` has, for a map of which the variances are enough: one that is given, under CE in evaluation.

Then V is diagonal, and so is each covariance, (N, G, d), that of the batch, (G, d), and K.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .records import BatchMoments, Moments, NormInput, Projected, ProjectedGradients


def of_batch(moments: Moments, length: int) -> BatchMoments:
    """Return the moments over samples and L positions: the variance is that within samples and that of their means."""
    mean = moments.means.mean(0)
    shifts = moments.means - mean
    between = shifts.square().mean(0)
    variance = torch.add(between, moments.covariances.mean(0), alpha=(length - 1) / length)
    return BatchMoments(mean=mean, covariance=variance, shifts=shifts)


def of_z(batch: BatchMoments, weight: None) -> NormInput:
    """Return mean and variance of z = h over samples and positions."""
    return NormInput(mean=batch.mean.flatten(), variance=batch.covariance.flatten())


def of_z_backward(
    d_mean: Tensor, d_variance: Tensor, batch_mean: Tensor, batch_covariance: Tensor, weight: None
) -> ProjectedGradients:
    """Return what comes through mean and variance of z, from their gradients, (C,)."""
    return ProjectedGradients(covariances=d_variance.view_as(batch_mean), mean=d_mean.view_as(batch_mean))


def of_x(moments: Moments, matrix: Tensor, a: Optional[Tensor]) -> Projected:
    """Return the variances of each sample's positions of x = a z + b, for a, (C,), or None for 1."""
    if a is None:
        return Projected(variance=moments.covariances.flatten(1), projected=moments.covariances)
    a = a.view(moments.means.shape[1:])
    projected = moments.covariances * a
    return Projected(variance=(projected * a).flatten(1), projected=projected)


def of_x_backward(
    d_variance: Tensor, matrix: Tensor, projected: Tensor, a: Optional[Tensor], num_blocks: int
) -> ProjectedGradients:
    """Return what comes through the variances of x, from their gradient, (N, C)."""
    d_variance = d_variance.view_as(projected)
    d_a = (d_variance * projected).sum(0)
    if a is not None:
        d_variance = d_variance * a.view(projected.shape[1:]).square()
    return ProjectedGradients(covariances=d_variance, matrix=torch.diag_embed(d_a))


def at_means(k_matrix: Tensor, shifts: Tensor, factor: float) -> Tensor:
    """Return factor K (m - mean), (N, G, d), for the shifts m - mean."""
    return k_matrix * shifts * factor
