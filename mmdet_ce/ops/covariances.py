"""The moments of z = W h and of x = V h + b from the covariances of the map h, and back.

``variances`` has the same functions for maps of which the variances are enough. The rows of W, and of V, belong to the
blocks of h in turn: through a convolution h is one block, and without one W is I and each channel group is a block.

In the backward pass a gradient of covariances is given as K, what comes through them to h: dh = K (h - mean).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .precision import add_matmul, matmul
from .records import BatchMoments, Moments, NormInput, Projected, ProjectedGradients


def of_batch(moments: Moments, length: int) -> BatchMoments:
    """Return the moments over samples and L positions: the covariance is that within samples and that of their means."""
    n = max(len(moments.means), 1)  # the moments of a batch of 0 are 0
    mean = moments.means.sum(0) / n  # (B, J)
    shifts = (moments.means - mean).transpose(0, 1)  # (B, N, J)
    within = moments.covariances.sum(0)  # (B, J, J)
    covariance = add_matmul(within, shifts.mT, shifts, beta=(length - 1) / (length * n), alpha=1 / n)
    return BatchMoments(mean=mean, covariance=covariance)


def of_z(batch: BatchMoments, weight: Optional[Tensor]) -> NormInput:
    """Return mean and variance of z over samples and positions; W is (C, J), None for I."""
    if weight is None:
        variance = batch.covariance.diagonal(dim1=1, dim2=2)
        return NormInput(mean=batch.mean.flatten(), variance=variance.flatten())
    variance = (matmul(weight, batch.covariance[0]) * weight).sum(1)
    mean = matmul(weight, batch.mean[0, :, None])[:, 0]
    return NormInput(mean=mean, variance=variance)


def of_z_backward(
    d_mean: Tensor, weights: Tensor, batch: BatchMoments, weight: Optional[Tensor]
) -> ProjectedGradients:
    """Return what comes through the mean of z, (C,), whose gradient is given, and through its variance.

    ``weights``, (C,), are the gradient of the variance as K has it: K = W^T diag(weights) W.
    """
    if weight is None:
        k_matrix = torch.diag_embed(weights.view_as(batch.mean))
        return ProjectedGradients(k_matrix=k_matrix, mean=d_mean.view_as(batch.mean))
    weighted = weights[:, None] * weight  # (C, J)
    return ProjectedGradients(
        k_matrix=matmul(weight.T, weighted)[None],
        mean=matmul(d_mean[None], weight),
        matrix=matmul(weighted, batch.covariance[0]),
    )


def of_x(moments: Moments, matrix: Tensor) -> Projected:
    """Return the variances of each sample's positions of x, for V, (G, d, J)."""
    rows = _by_block(matrix, moments.means.shape[1])
    projected = matmul(moments.covariances, rows.mT).mT.flatten(1, 2)  # V S / (L - 1), (N, C, J)
    variance = torch.einsum('ncj,cj->nc', projected, matrix.flatten(0, 1))
    return Projected(variance=variance, projected=projected)


def of_x_backward(weights: Tensor, matrix: Tensor, projected: Tensor, num_blocks: int) -> ProjectedGradients:
    """Return what comes through the variances of x; the weights are (N, C), K = V^T diag(weights) V."""
    rows = _by_block(matrix, num_blocks)
    weighted = weights.unflatten(1, (num_blocks, -1))[..., None] * rows  # (N, B, R, J)
    return ProjectedGradients(
        k_matrix=matmul(rows.mT, weighted),
        matrix=torch.einsum('nc,ncj->cj', weights, projected).view_as(matrix),
    )


def covariance_of_x(batch: BatchMoments, matrix: Tensor) -> Projected:
    """Return the covariance of x over samples and positions, (G, d, d), for V, (G, d, J)."""
    rows = _by_block(matrix, len(batch.mean))
    projected = matmul(rows, batch.covariance).view_as(matrix)
    return Projected(variance=matmul(projected, matrix.mT), projected=projected)


def covariance_of_x_backward(
    weights: Tensor, matrix: Tensor, projected: Tensor, num_blocks: int
) -> ProjectedGradients:
    """Return what comes through the covariance of x; the weights are (G, d, d), symmetric, K = V^T weights V."""
    weighted = matmul(weights, matrix)  # (G, d, J)
    return ProjectedGradients(
        k_matrix=matmul(_by_block(matrix, num_blocks).mT, _by_block(weighted, num_blocks)),
        matrix=matmul(weights, projected),
    )


def mean_backward(d_mean: Tensor, matrix: Tensor, num_blocks: int) -> Tensor:
    """Return the gradient of the mean of h, (B, J), from that of the mean of x, (G, d)."""
    return matmul(d_mean.view(num_blocks, 1, -1), _by_block(matrix, num_blocks))[:, 0]


def at_means(k_matrix: Tensor, shifts: Tensor) -> Tensor:
    """Return K (m - mean), (N, B, J)."""
    return matmul(shifts.transpose(0, 1), k_matrix).transpose(0, 1)


def _by_block(matrix: Tensor, num_blocks: int) -> Tensor:
    """Return (G, d, J) as (B, R, J): the rows that belong to each block."""
    return matrix.reshape(num_blocks, -1, matrix.shape[-1])
