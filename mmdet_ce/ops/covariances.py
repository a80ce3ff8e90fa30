"""The moments of z = W h and of x = V h + b from the covariances of the map h, and back.

``variances`` has the same functions for maps of which the variances are enough. The rows of W, and of V, belong to the
blocks of h in turn: through a convolution h is one block, and without one W is I and each channel group is a block.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .precision import add_matmul, dot_rows, matmul, sum_rows
from .records import BatchMoments, Moments, NormInput, Projected, ProjectedGradients


def of_batch(moments: Moments, length: int) -> BatchMoments:
    """Return the moments over samples and L positions; the covariance is that of positions and of means."""
    n = max(len(moments.means), 1)
    mean = moments.means.mean(0) if len(moments.means) else moments.means.sum(0)  # (B, J); of none 0, not NaN
    shifts = moments.means - mean
    by_block = shifts.transpose(0, 1)  # (B, N, J)
    within = moments.covariances.sum(0)  # (B, J, J)
    covariance = add_matmul(within, by_block.mT, by_block, beta=(length - 1) / (length * n), alpha=1 / n)
    return BatchMoments(mean=mean, covariance=covariance, shifts=shifts)


def of_z(batch: BatchMoments, weight: Optional[Tensor]) -> NormInput:
    """Return mean and variance of z over samples and positions; W is (C, J), None for I."""
    if weight is None:
        variance = batch.covariance.diagonal(dim1=1, dim2=2)
        return NormInput(mean=batch.mean.flatten(), variance=variance.flatten())
    variance = (matmul(weight, batch.covariance[0]) * weight).sum(1)
    mean = matmul(weight, batch.mean[0, :, None])[:, 0]
    return NormInput(mean=mean, variance=variance)


def of_z_backward(
    d_mean: Tensor, d_variance: Tensor, batch_mean: Tensor, batch_covariance: Tensor, weight: Optional[Tensor]
) -> ProjectedGradients:
    """Return what comes through mean and variance of z, from their gradients, (C,)."""
    if weight is None:
        d_covariance = torch.diag_embed(d_variance.view_as(batch_mean))
        return ProjectedGradients(covariances=d_covariance, mean=d_mean.view_as(batch_mean))
    weighted = d_variance[:, None] * weight  # (C, J)
    return ProjectedGradients(
        covariances=matmul(weight.T, weighted)[None],
        mean=matmul(d_mean[None], weight),
        matrix=matmul(weighted, batch_covariance[0]),
    )


def of_x(moments: Moments, matrix: Tensor, a: Optional[Tensor]) -> Projected:
    """Return the variances of each sample's positions of x, for V, (G, d, J)."""
    rows = _by_block(matrix, moments.means.shape[1])
    projected = matmul(rows, moments.covariances).flatten(1, 2)  # V S / (L - 1), (N, C, J)
    variance = dot_rows(projected, matrix.flatten(0, 1))
    return Projected(variance=variance, projected=projected)


def of_x_backward(
    d_variance: Tensor, matrix: Tensor, projected: Tensor, a: Optional[Tensor], num_blocks: int
) -> ProjectedGradients:
    """Return what comes through the variances of x, from their gradient, (N, C)."""
    rows = _by_block(matrix, num_blocks)
    weighted = d_variance.unflatten(1, (num_blocks, -1))[..., None] * rows  # (N, B, R, J)
    return ProjectedGradients(
        covariances=matmul(rows.mT, weighted),
        matrix=sum_rows(d_variance, projected).view_as(matrix),
    )


def covariance_of_x(batch: BatchMoments, matrix: Tensor) -> Projected:
    """Return the covariance of x over samples and positions, (G, d, d), for V, (G, d, J)."""
    rows = _by_block(matrix, len(batch.mean))
    projected = matmul(rows, batch.covariance).view_as(matrix)
    return Projected(variance=matmul(projected, matrix.mT), projected=projected)


def covariance_of_x_backward(
    d_covariance: Tensor, d_mean: Optional[Tensor], matrix: Tensor, num_blocks: int
) -> ProjectedGradients:
    """Return what comes through the covariance of x, (G, d, d), and through its mean, (G, d), from their gradients.

    The gradient of the covariance is symmetric. That of the mean is None for 0.
    """
    rows = _by_block(matrix, num_blocks)
    weighted = _by_block(matmul(d_covariance, matrix), num_blocks)
    mean = None if d_mean is None else matmul(d_mean.view(num_blocks, 1, -1), rows)[:, 0]
    return ProjectedGradients(covariances=matmul(rows.mT, weighted), mean=mean)


def at_means(k_matrix: Tensor, shifts: Tensor, factor: float) -> Tensor:
    """Return factor K (m - mean), (N, B, J), for the shifts m - mean."""
    by_block = shifts.transpose(0, 1)
    return add_matmul(by_block, by_block, k_matrix, beta=0, alpha=factor).transpose(0, 1)


def _by_block(matrix: Tensor, num_blocks: int) -> Tensor:
    """Return (G, d, J) as (B, R, J): the rows that belong to each block."""
    return matrix.reshape(num_blocks, -1, matrix.shape[-1])
