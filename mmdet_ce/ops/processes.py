"""The processes whose samples together are the batch: one, or all of a process group (``sync=True``)."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor


class BatchMoments(NamedTuple):
    """Moments of a batch that can be merged."""

    samples: Tensor  # (1,), N, or a number
    positions: Tensor  # (1,), N L, or a number
    mean: Tensor  # (G, d), over samples and positions
    covariance: Tensor  # (G, d, d), biased
    mean_variance: Tensor  # (1,), of the samples' variances over channels
    rounding: Tensor  # (1,), the variance that rounding alone may leave


class OneProcess:
    """This process alone."""

    size = 1

    def merge(self, moments: BatchMoments) -> BatchMoments:
        """Return the moments of the whole batch from those of this process's part."""
        return moments

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the sums of values over the processes."""
        return values


class ProcessGroup(OneProcess):
    """The processes of a group, in two exchanges: the moments in the forward pass, two gradients in the backward pass.

    Nothing is copied from or to the host.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = group.size()

    def merge(self, moments: BatchMoments) -> BatchMoments:  # noqa: D102, see OneProcess
        n, positions, mean, covariance, mean_variance, rounding = moments
        counts = [torch.full((1,), float(count), dtype=mean.dtype, device=mean.device) for count in (n, positions)]
        packed = torch.cat([*counts, mean_variance, rounding, mean.flatten(), covariance.flatten()])
        gathered = packed.new_empty(self.size, len(packed))
        dist.all_gather(list(gathered.unbind()), packed, group=self.group)
        n, positions, mean_variance, rounding, process_means, process_covariances = gathered.split(
            [1, 1, 1, 1, mean.numel(), covariance.numel()], 1
        )
        by_sample, by_position = n / n.sum(), positions / positions.sum()
        mean = (by_position * process_means).sum(0)
        # The covariances lie about each process's own mean: add that of the means
        shifts = (process_means - mean).view(-1, *covariance.shape[:2])
        within = (by_position * process_covariances).sum(0).view(covariance.shape)
        between = torch.einsum('p,pgi,pgj->gij', by_position[:, 0], shifts, shifts)
        return BatchMoments(
            n.sum(0),
            positions.sum(0),
            mean.view(covariance.shape[:2]),
            within + between,
            (by_sample * mean_variance).sum(0),
            (by_sample * rounding).sum(0),
        )

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:  # noqa: D102, see OneProcess
        packed = torch.cat([value.flatten() for value in values])
        dist.all_reduce(packed, group=self.group)
        parts = packed.split([value.numel() for value in values])
        return tuple(part.view(value.shape) for part, value in zip(parts, values))


def processes_of(group: Optional[dist.ProcessGroup]) -> OneProcess:
    """Return the processes of a group, or this one alone for None."""
    return OneProcess() if group is None else ProcessGroup(group)
