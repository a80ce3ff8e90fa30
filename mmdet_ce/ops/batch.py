"""The statistics of the batch that CE trains on: mean and covariance of each group, and s = sqrt(mean(v)).

The covariance over samples and positions is that within the samples and that of their means,

    Sigma_z = sum_n S_n / (N L) + sum_n (m_n - mu)(m_n - mu)^T / N,

of z, the input of a norm that is folded in, or of x itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .norm_affine import Unfolded
from .processes import BatchMoments, OneProcess


class BatchStatistics(NamedTuple):
    """Statistics of the whole batch, of all processes."""

    samples: Tensor  # (1,), N, or a number
    positions: Tensor  # (1,), N L, or a number
    between: Tensor  # (N, G, d), m_n - mu
    mean: Tensor  # (G, d), mu of x
    covariance: Tensor  # (G, d, d), of z
    has_variance: Tensor  # (1,), whether the variances are more than rounding
    scale: Tensor  # (1,), s


def batch_statistics(
    sample_means: Tensor, scatter: Tensor, length: int, variance: Tensor, norm: Unfolded, processes: OneProcess
) -> BatchStatistics:
    """Return the statistics of the batch.

    Args:
        sample_means: m, (N, G, d), of z.
        scatter: S, (N, G, d, d), of z.
        length: Positions L of a sample.
        variance: v, (N, G, d), of x.
        norm: The norm between z and x.
        processes: Whose samples are the batch.
    """
    n = len(sample_means)
    mean = sample_means.mean(0)
    shifts = (sample_means - mean).transpose(0, 1)
    covariance = torch.baddbmm(scatter.sum(0), shifts.mT, shifts, beta=1 / (n * length), alpha=1 / n)
    mean_square = norm.mean(sample_means).square().mean().view(1)
    local = BatchMoments(n, n * length, mean, covariance, variance.mean().view(1), mean_square)
    whole = processes.merge(local)
    # A batch without spatial variance (all-zero, constant or 1x1 maps; the network's first step when
    # zero_init_residual zeroes the norm before CE) has nothing to be equalized: s = 1, where the formula has 0/0.
    rounding = (8 * torch.finfo(variance.dtype).eps) ** 2
    has_variance = whole.mean_variance > rounding * whole.mean_square
    scale = torch.where(has_variance, whole.mean_variance, 1.0).sqrt()
    between = shifts.transpose(0, 1) if whole is local else sample_means - whole.mean
    return BatchStatistics(
        whole.samples, whole.positions, between, norm.mean(whole.mean), whole.covariance, has_variance, scale
    )


def scale_backward(statistics: BatchStatistics, num_channels: int, d_log_inverse_scale: Tensor) -> Tensor:
    """Return what every variance's gradient, (N, C), loses through s = sqrt(mean(v)), (1,).

    Args:
        statistics: Of the forward pass.
        num_channels: C.
        d_log_inverse_scale: (1,), the gradient with respect to log(1 / s), of all processes.
    """
    return (
        statistics.has_variance
        * d_log_inverse_scale
        / (statistics.samples * (2 * num_channels) * statistics.scale.square())
    )


def covariance_backward(statistics: BatchStatistics, d_covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return what dx gets through the covariance: S x + constant, for x about the samples' means.

    Args:
        statistics: Of the forward pass.
        d_covariance: (G, d, d), symmetric, of z.

    Returns:
        What multiplies x - m_n, (G, d, d), and dm_n / L, (N, G, d).
    """
    symmetric = d_covariance * (2 / statistics.positions)
    return symmetric, torch.einsum('ngi,gij->ngj', statistics.between, symmetric)
