"""The statistics of the batch that CE trains on: mean and covariance of each group, and s = sqrt(mean(v)).

The covariance over samples and positions is that within the samples and that of their means,

    Sigma_z = sum_n S_n / (N L) + sum_n (m_n - mu)(m_n - mu)^T / N,

of z, the input of a norm that is folded in, or of x itself. The batch is that of this process, or of all processes of
a group (``sync=True``): then the moments are exchanged in the forward pass, and two gradients in the backward pass.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from .maps import SCATTER_UNIT
from .precision import add_matmul, least_variance, matmul, rounding_variance
from .records import Options, Saved


def batch_statistics(
    sample_means: Tensor, scatter: Tensor, length: int, x_means: Tensor, variance: Tensor, options: Options
) -> tuple[Optional[Tensor], ...]:
    """Return the moments of the whole batch.

    Args:
        sample_means: m, (N, G, d), of z.
        scatter: S, (N, G, d, d), of z, in units of ``SCATTER_UNIT``.
        length: Positions L of a sample.
        x_means: (N, G, d), of x.
        variance: v, (N, G, d), of x.
        options: Have the processes and the dtype of the map.

    Returns:
        N and N L of all processes, (1,), None where there is one; mu, (G, d), and the covariance, (G, d, d), of z;
        mean(v) and what of it rounding alone may leave, (1,).
    """
    n, share = len(sample_means), 1 / variance.numel()  # shares are summed, since the sum alone could overflow
    mean = sample_means.mean(0)
    shifts = (sample_means - mean).transpose(0, 1)
    within = scatter.sum(0)
    covariance = add_matmul(within, shifts.mT, shifts, beta=SCATTER_UNIT / (n * length), alpha=1 / n)
    mean_variance = (variance * share).sum().view(1)
    rounding = (x_means.square() * (share * rounding_variance(options.map_dtype))).sum().view(1)
    if options.process_group is None:
        return None, None, mean, covariance, mean_variance, rounding
    counts = [torch.full((1,), float(count), dtype=mean.dtype, device=mean.device) for count in (n, n * length)]
    return _merged(options.process_group, *counts, mean, covariance, mean_variance, rounding)


def _merged(group: dist.ProcessGroup, *moments: Tensor) -> tuple[Tensor, ...]:
    """Return the moments of the whole batch from those of this process's part."""
    packed = torch.cat([tensor.flatten() for tensor in moments])
    gathered = packed.new_empty(group.size(), len(packed))
    dist.all_gather(list(gathered.unbind()), packed, group=group)
    parts = gathered.split([tensor.numel() for tensor in moments], 1)
    samples, positions, means, covariances, variances, roundings = parts
    shape = moments[3].shape
    by_sample, by_position = samples / samples.sum(), positions / positions.sum()
    mean = (by_position * means).sum(0)
    # The covariances lie about each process's own mean: add that of the means
    shifts = (means - mean).view(-1, *shape[:2])
    between = matmul((by_position[:, :, None] * shifts).permute(1, 2, 0), shifts.transpose(0, 1))
    covariance = (by_position * covariances).sum(0).view(shape) + between
    shares = (by_sample * variances).sum(0), (by_sample * roundings).sum(0)
    return samples.sum(0), positions.sum(0), mean.view(shape[:2]), covariance, *shares


def summed(group: Optional[dist.ProcessGroup], *values: Tensor) -> tuple[Tensor, ...]:
    """Return the sums of values over the processes of a group."""
    if group is None:
        return values
    packed = torch.cat([value.flatten() for value in values])
    dist.all_reduce(packed, group=group)
    parts = packed.split([value.numel() for value in values])
    return tuple(part.view(value.shape) for part, value in zip(parts, values))


def batch_scale(mean_variance: Tensor, rounding: Tensor, map_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return whether the batch lacks variance, and s, (1,) each.

    A batch without spatial variance (all-zero, constant or 1x1 maps; the network's first step when zero_init_residual
    zeroes the norm before CE) has nothing to be equalized: s = 1, where the formula has 0/0.
    """
    lacks_variance = mean_variance <= rounding + least_variance(map_dtype)
    return lacks_variance, mean_variance.masked_fill(lacks_variance, 1.0).sqrt()


def batch_scale_backward(saved: Saved, d_variance: Tensor, d_log_inverse_scale: Tensor) -> Tensor:
    """Add to the gradient of v, (N, C), what comes through s = sqrt(mean(v)), from that of log(1 / s), (1,)."""
    n, channels = d_variance.shape
    of_each = d_log_inverse_scale.masked_fill(saved.lacks_variance, 0.0)
    of_each = of_each / ((n if saved.samples is None else saved.samples) * (2 * channels))
    return torch.addcdiv(d_variance, of_each, saved.scale.square(), value=-1)
