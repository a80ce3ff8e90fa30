"""The statistics of the batch that CE trains on: mean and covariance of each group, and s = sqrt(mean(v)).

The covariance over samples and positions is that within the samples and that of their means,

    Sigma_z = sum_n S_n / (N L) + sum_n (m_n - mu)(m_n - mu)^T / N,

of z, the input of a norm that is folded in, or of x itself. The batch is that of this process, or of all processes of
a group (``sync=True``): then there are two exchanges, the moments in the forward pass and two gradients in the backward
pass. Nothing is copied from or to the host.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .maps import SCATTER_UNIT
from .precision import least_variance, rounding_variance
from .records import Saved


class Batch(NamedTuple):
    """Moments of a batch, or of the part of it that one process has."""

    samples: Union[int, Tensor]  # N
    positions: Union[int, Tensor]  # N L
    mean: Tensor  # (G, d), mu of z
    covariance: Tensor  # (G, d, d), of z
    mean_variance: Tensor  # (1,), mean(v)
    rounding: Tensor  # (1,), what of it rounding alone may leave


def batch_statistics(
    sample_means: Tensor,
    scatter: Tensor,
    length: int,
    x_means: Tensor,
    variance: Tensor,
    map_dtype: torch.dtype,
    group: Optional[dist.ProcessGroup],
) -> Batch:
    """Return the moments of the whole batch.

    Args:
        sample_means: m, (N, G, d), of z.
        scatter: S, (N, G, d, d), of z, in units of ``SCATTER_UNIT``.
        length: Positions L of a sample.
        x_means: (N, G, d), of x.
        variance: v, (N, G, d), of x.
        map_dtype: In what the map was reduced.
        group: The processes whose samples are the batch; None for this one alone.
    """
    n, share = len(sample_means), 1 / variance.numel()  # shares are summed, since the sum alone could overflow
    mean = sample_means.mean(0)
    shifts = (sample_means - mean).transpose(0, 1)
    within = scatter.sum(0)
    covariance = torch.baddbmm(within, shifts.mT, shifts, beta=SCATTER_UNIT / (n * length), alpha=1 / n)
    rounding = x_means.square() * (share * rounding_variance(map_dtype))
    batch = Batch(n, n * length, mean, covariance, (variance * share).sum().view(1), rounding.sum().view(1))
    return batch if group is None else _merged(batch, group)


def _merged(part: Batch, group: dist.ProcessGroup) -> Batch:
    """Return the moments of the whole batch from those of this process's part."""
    mean, shape = part.mean, part.covariance.shape
    counts = [torch.full((1,), float(n), dtype=mean.dtype, device=mean.device) for n in (part.samples, part.positions)]
    packed = torch.cat([*counts, part.mean_variance, part.rounding, mean.flatten(), part.covariance.flatten()])
    gathered = packed.new_empty(group.size(), len(packed))
    dist.all_gather(list(gathered.unbind()), packed, group=group)
    n, positions, mean_variance, rounding, means, covariances = gathered.split(
        [1, 1, 1, 1, mean.numel(), shape.numel()], 1
    )
    by_sample, by_position = n / n.sum(), positions / positions.sum()
    mean = (by_position * means).sum(0)
    # The covariances lie about each process's own mean: add that of the means
    shifts = (means - mean).view(-1, *shape[:2])
    between = torch.einsum('p,pgi,pgj->gij', by_position[:, 0], shifts, shifts)
    covariance = (by_position * covariances).sum(0).view(shape) + between
    shares = (by_sample * mean_variance).sum(0), (by_sample * rounding).sum(0)
    return Batch(n.sum(0), positions.sum(0), mean.view(shape[:2]), covariance, *shares)


def summed(group: Optional[dist.ProcessGroup], *values: Tensor) -> tuple[Tensor, ...]:
    """Return the sums of values over the processes of a group."""
    if group is None:
        return values
    packed = torch.cat([value.flatten() for value in values])
    dist.all_reduce(packed, group=group)
    parts = packed.split([value.numel() for value in values])
    return tuple(part.view(value.shape) for part, value in zip(parts, values))


def batch_scale(batch: Batch, map_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return whether the batch lacks variance, and s, (1,) each.

    A batch without spatial variance (all-zero, constant or 1x1 maps; the network's first step when zero_init_residual
    zeroes the norm before CE) has nothing to be equalized: s = 1, where the formula has 0/0.
    """
    lacks_variance = batch.mean_variance <= batch.rounding + least_variance(map_dtype)
    return lacks_variance, batch.mean_variance.masked_fill(lacks_variance, 1.0).sqrt()


def batch_scale_backward(saved: Saved, d_variance: Tensor, d_log_inverse_scale: Tensor) -> Tensor:
    """Return the gradient of the variances, (N, C), with what comes through s = sqrt(mean(v)).

    Args:
        saved: Of the forward pass.
        d_variance: (N, C), without.
        d_log_inverse_scale: (1,), the gradient with respect to log(1 / s), of all processes.
    """
    n, channels = d_variance.shape
    of_each = d_log_inverse_scale.masked_fill(saved.lacks_variance, 0.0)
    of_each = of_each / ((n if saved.samples is None else saved.samples) * (2 * channels))
    return torch.addcdiv(d_variance, of_each, saved.scale.square(), value=-1)
