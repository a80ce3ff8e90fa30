"""The batch that CE trains on: that of this process, or of all processes of a group (``sync=True``), and its scale s.

The moments of a group are exchanged in the forward pass, and two gradients in the backward pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from .precision import least_variance, matmul, rounding_variance
from .records import Saved


class Batch(NamedTuple):
    """The moments of x over the batch; of one process, if there is no more than one, the shares are None."""

    mean: Tensor  # (G, d)
    covariance: Tensor  # (G, d, d)
    mean_variance: Tensor  # (1,), s^2: the variance of each sample's positions, on average
    sample_share: Optional[Tensor] = None  # (1,), this process's share of the samples
    position_share: Optional[Tensor] = None  # (1,), and of the positions
    shift: Optional[Tensor] = None  # (G, d), this process's mean minus that of all


def merged(own: Batch, num_samples: int, length: int, group: Optional[dist.ProcessGroup]) -> Batch:
    """Return the moments of the whole batch from those of this process's samples, of L positions each."""
    if group is None:
        return own
    if num_samples == 0:  # then it is NaN
        own = own._replace(mean_variance=torch.zeros_like(own.mean_variance))
    samples = own.mean.new_full((1,), num_samples)
    parts = (samples, samples * length, own.mean, own.covariance, own.mean_variance)
    packed = torch.cat([tensor.flatten() for tensor in parts])
    gathered = packed.new_empty(group.size(), len(packed))
    dist.all_gather(list(gathered.unbind()), packed, group=group)
    samples, positions, means, covariances, variances = gathered.split([tensor.numel() for tensor in parts], 1)
    by_sample = samples / samples.sum()  # (processes, 1)
    by_position = positions / positions.sum()
    mean = (by_position * means).sum(0)
    # The covariances are about each process's own mean: add that of the means
    shifts = (means - mean).view(-1, *own.mean.shape)  # (processes, G, d)
    between = matmul((by_position[:, :, None] * shifts).permute(1, 2, 0), shifts.transpose(0, 1))
    covariance = (by_position * covariances).sum(0).view_as(between) + between
    rank = dist.get_rank(group)
    return Batch(
        mean=mean.view_as(own.mean),
        covariance=covariance,
        mean_variance=(by_sample * variances).sum(0),
        sample_share=by_sample[rank],
        position_share=by_position[rank],
        shift=shifts[rank],
    )


def merged_backward(d_covariance: Tensor, saved: Saved) -> tuple[Tensor, Optional[Tensor]]:
    """Return the gradients of this process's covariance and mean of x from that of the covariance of the whole batch.

    Both covariances' gradients are symmetric, (G, d, d). That of the mean is (G, d), or None for 0.
    """
    if saved.shift is None:
        return d_covariance, None
    d_covariance = d_covariance * saved.position_share
    d_mean = 2 * matmul(d_covariance, saved.shift[..., None])[..., 0]
    return d_covariance, d_mean


class Scale(NamedTuple):
    """The scale s; the other fields are those of ``Saved``."""

    scale: Tensor  # (1,)
    mean_variance: Tensor  # (1,), s^2
    has_variance: Tensor  # (1,), whether the batch has more variance than rounding leaves
    is_finite: Tensor  # (1,), whether the batch is finite


def batch_scale(batch: Batch, map_dtype: torch.dtype) -> Scale:
    """Return s = sqrt(mean(v)).

    A batch without variance of positions (all-zero, constant or 1x1 maps; the network's first step when
    zero_init_residual zeroes the norm before CE) has nothing to be equalized: s = 1, where the formula has 0 / 0.
    """
    second_moment = torch.addcmul(batch.covariance.diagonal(dim1=1, dim2=2), batch.mean, batch.mean).mean().view(1)
    beyond_rounding = torch.sub(batch.mean_variance, second_moment, alpha=rounding_variance(map_dtype))
    has_variance = beyond_rounding > least_variance(map_dtype)
    mean_variance = torch.where(has_variance, batch.mean_variance, 1.0)
    return Scale(
        scale=mean_variance.sqrt(),
        mean_variance=mean_variance,
        has_variance=has_variance,
        is_finite=batch.mean_variance < math.inf,  # NaN is not less
    )


def batch_scale_backward(d_variance: Tensor, d_log_inverse_scale: Tensor, saved: Saved) -> Tensor:
    """Add to the gradient of v, (N, C), what comes through s = sqrt(mean(v)), from that of log(1 / s), (1,)."""
    of_all = d_log_inverse_scale * saved.has_variance
    if saved.sample_share is not None:
        of_all = of_all * saved.sample_share
    return torch.addcdiv(d_variance, of_all, saved.mean_variance, value=-0.5 / max(d_variance.numel(), 1))


def summed(group: Optional[dist.ProcessGroup], *values: Tensor) -> tuple[Tensor, ...]:
    """Return the sums of values over the processes of a group."""
    if group is None:
        return values
    packed = torch.cat([value.flatten() for value in values])
    dist.all_reduce(packed, group=group)
    parts = packed.split([value.numel() for value in values])
    return tuple(part.view(value.shape) for part, value in zip(parts, values))
