"""Set running statistics from data, exactly and without touching weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.logging import print_log
from mmengine.model import BaseModel, is_model_wrapper
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import ChannelEquilibrium


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], num_batches: int, with_bn: bool = False) -> int:
    """Set CE's running statistics to their mean over batches of training data; return the number of batches.

    The model makes its own training pass over each batch, without gradients. Meanwhile every layer that is calibrated
    works on the statistics of the batch, as it does in training. So the result is the exact mean, whatever the order of
    the batches. Training keeps a moving average, which forgets. The mean is that of all processes. Parameters, other
    buffers and the modes of all modules are left as they were.

    A layer that the training pass does not run in training mode keeps its values, and one line in the log says so. The
    teacher of a semi-supervised training is such a part.

    Args:
        model: A detector of mmdet, or a backbone, whose batches are image tensors, (N, 3, H, W). CE is found anywhere
            in it.
        batches: Batches of the training data loader.
        num_batches: Batches to average over, on each process.
        with_bn: Whether to set the running mean and variance of all BatchNorms too.

    Raises:
        ValueError: If there is no layer to calibrate, no batch, or one whose statistics are not finite. All processes
            raise it together.
    """
    model = model.module if is_model_wrapper(model) else model
    kinds = (ChannelEquilibrium, _BatchNorm) if with_bn else (ChannelEquilibrium,)
    means = [
        _Mean(name, m)
        for name, m in model.named_modules()
        if isinstance(m, kinds) and getattr(m, 'track_running_stats', True)
    ]
    if not means:
        raise ValueError(f'{type(model).__name__} has no layer to calibrate')
    count = 0
    with _batch_statistics(model, means):
        for batch in _limited(batches, num_batches):
            _training_pass(model, batch)
            count += 1
    for mean in means:
        mean.join_processes()
    reached = [mean for mean in means if mean.count]
    if not reached:
        raise ValueError('no batch to calibrate with: the data loader is empty or num_batches is 0')
    for mean in reached:
        mean.write()
    _name_left_out([mean.name for mean in means if not mean.count])
    return count


class _Mean:
    """The mean of a layer's running values over its forward passes, summed on the CPU: not all devices have float64."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name = name
        self.layer = layer
        self.buffers = [buffer for buffer in layer.buffers() if buffer.is_floating_point()]
        self.sums = [torch.zeros(buffer.shape, dtype=torch.float64) for buffer in self.buffers]
        self.count = torch.zeros(1, dtype=torch.float64)

    def add(self, layer: nn.Module, args: tuple, out: Tensor) -> None:
        """Add the statistics of the forward pass that the layer has just made; a forward hook."""
        if not layer.training:
            return
        # CE ignores a batch whose statistics are not finite: then the scale is still the 0 that was written here.
        ignored = isinstance(layer, ChannelEquilibrium) and layer.ir.running_scale == 0
        for total, buffer in zip(self.sums, self.buffers):
            total += math.nan if ignored else buffer.cpu()
        self.count += 1
        self.clear()

    def clear(self) -> None:
        """Forget the running values: a NaN would survive the next update."""
        for buffer in self.buffers:
            buffer.zero_()

    def join_processes(self) -> None:
        """Add the sums of the other processes. A value that is not finite on one of them is so on all afterwards."""
        for total in (self.count, *self.sums):
            all_reduce(total, op='sum')

    def write(self) -> None:
        """Set the layer's running values."""
        if not all(total.isfinite().all() for total in self.sums):
            raise ValueError(f'the statistics of {self.name} are not finite; look for NaN or inf in images and weights')
        for buffer, total in zip(self.buffers, self.sums):
            buffer.copy_(total / self.count)


@contextmanager
def _batch_statistics(model: nn.Module, means: list[_Mean]) -> Iterator[None]:
    """Let the layers to calibrate work on the batch's statistics, as in training, and the others as in evaluation."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    momenta = [mean.layer.momentum for mean in means]
    hooks = [mean.layer.register_forward_hook(mean.add) for mean in means]
    try:
        for m, _ in modes:
            m.training = any(True for _ in m.children())  # a detector makes its training pass; norms and dropout rest
        for mean in means:
            mean.layer.train()
            mean.layer.momentum = 1.0  # so that the running values are the batch's own
            mean.clear()
        yield
    finally:
        for m, training in modes:
            m.training = training
        for mean, momentum, hook in zip(means, momenta, hooks):
            mean.layer.momentum = momentum
            hook.remove()
        for buffer, value in buffers:
            buffer.copy_(value)


def _training_pass(model: nn.Module, batch: Any) -> None:
    if not isinstance(model, BaseModel):  # a backbone
        model(batch)
        return
    data = model.data_preprocessor(batch, True)
    if isinstance(data, dict):
        model(**data, mode='loss')
    else:
        model(*data, mode='loss')


def _limited(batches: Iterable[Any], num_batches: int) -> Iterable[Any]:
    """Iterate over the first batches, with a progress bar on the first rank."""
    total = min(num_batches, len(batches)) if hasattr(batches, '__len__') else num_batches
    return track(islice(batches, num_batches), 'calibrating', total=total, disable=get_dist_info()[0] != 0)


def _name_left_out(names: list[str]) -> None:
    if names:
        text = (
            f'{len(names)} layers keep their statistics, because the training pass does not run them in training mode: '
            f'{", ".join(names)}. If they are in the teacher of a semi-supervised training, set '
            'MeanTeacherHook(skip_buffer=False): it copies the statistics of the student'
        )
        print_log(text, logger='current', level=logging.WARNING)
