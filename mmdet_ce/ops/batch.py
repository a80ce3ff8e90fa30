"""The statistics of the batch that CE trains on: mean and covariance of each group, and s = sqrt(mean(v)).

The covariance over samples and positions is that within the samples and that of their means,

    Sigma_z = sum_n S_n / (N L) + sum_n (m_n - mu)(m_n - mu)^T / N,

of z, the input of a norm that is folded in, or of x itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .maps import SCATTER_UNIT
from .norm_affine import Unfolded
from .precision import least_variance, rounding_variance
from .processes import BatchMoments, OneProcess


class BatchStatistics(NamedTuple):
    """Statistics of the whole batch, of all processes."""

    samples: Tensor  # (1,), N, or a number
    positions: Tensor  # (1,), N L, or a number
    z_mean: Tensor  # (G, d), mu of z
    z_covariance: Tensor  # (G, d, d)
    lacks_variance: Tensor  # (1,), whether the variances are no more than rounding
    scale: Tensor  # (1,), s


def batch_statistics(
    sample_means: Tensor,
    scatter: Tensor,
    length: int,
    variance: Tensor,
    norm: Unfolded,
    processes: OneProcess,
    map_dtype: torch.dtype,
) -> BatchStatistics:
    """Return the statistics of the batch.

    Args:
        sample_means: m, (N, G, d), of z.
        scatter: S, (N, G, d, d), of z, in units of ``SCATTER_UNIT``.
        length: Positions L of a sample.
        variance: v, (N, G, d), of x.
        norm: The norm between z and x.
        processes: Whose samples are the batch.
        map_dtype: In what the map was reduced.
    """
    n, share = len(sample_means), 1 / variance.numel()  # shares are summed, since the sum alone could overflow
    z_mean = sample_means.mean(0)
    shifts = (sample_means - z_mean).transpose(0, 1)
    within = scatter.sum(0)
    z_covariance = torch.baddbmm(within, shifts.mT, shifts, beta=SCATTER_UNIT / (n * length), alpha=1 / n)
    rounding = norm.mean(sample_means).square() * (share * rounding_variance(map_dtype))
    local = BatchMoments(n, n * length, z_mean, z_covariance, (variance * share).sum().view(1), rounding.sum().view(1))
    whole = processes.merge(local)
    # A batch without spatial variance (all-zero, constant or 1x1 maps; the network's first step when
    # zero_init_residual zeroes the norm before CE) has nothing to be equalized: s = 1, where the formula has 0/0.
    lacks_variance = whole.mean_variance <= whole.rounding + least_variance(map_dtype)
    scale = whole.mean_variance.masked_fill(lacks_variance, 1.0).sqrt()
    return BatchStatistics(whole.samples, whole.positions, whole.mean, whole.covariance, lacks_variance, scale)


def scale_backward(statistics: BatchStatistics, d_variance: Tensor, d_log_inverse_scale: Tensor) -> Tensor:
    """Return the gradient of the variances, (N, C), with what comes through s = sqrt(mean(v)).

    Args:
        statistics: Of the forward pass.
        d_variance: (N, C), without.
        d_log_inverse_scale: (1,), the gradient with respect to log(1 / s), of all processes.
    """
    of_each = d_log_inverse_scale.masked_fill(statistics.lacks_variance, 0.0)
    of_each = of_each / (statistics.samples * (2 * d_variance.shape[1]))
    return torch.addcdiv(d_variance, of_each, statistics.scale.square(), value=-1)


def covariance_backward(statistics: BatchStatistics, d_covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return what dx gets through the covariance, K (x - mu): K, (G, d, d), and K mu, (G, d).

    Args:
        statistics: Of the forward pass.
        d_covariance: (G, d, d), symmetric, of z.
    """
    slope = d_covariance * (2 / statistics.positions)
    return slope, (slope @ statistics.z_mean[..., None])[..., 0]
