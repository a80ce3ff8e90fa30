"""Set running statistics from data, exactly and without touching weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.model import is_model_wrapper
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import ChannelEquilibrium


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], num_batches: int, with_bn: bool = False) -> int:
    """Set CE's running statistics to their mean over batches of training data; return the number of batches.

    Meanwhile every layer that is calibrated works on the statistics of the batch, as it does in training. So the
    result is the exact mean, whatever the order of the batches. Training keeps a moving average, which forgets. Ranks
    are averaged. Parameters, other buffers and the modes of all modules are left as they were.

    Args:
        model: A detector of mmdet, or a backbone, whose batches are image tensors, (N, 3, H, W).
        batches: Batches of the training data loader.
        num_batches: Batches to average over, on each rank.
        with_bn: Whether to set the running mean and variance of the backbone's BatchNorms, too.

    Raises:
        ValueError: If there is no layer to calibrate, no batch, or one whose statistics are not finite.
    """
    model = model.module if is_model_wrapper(model) else model
    backbone = getattr(model, 'backbone', model)
    kinds = (ChannelEquilibrium, _BatchNorm) if with_bn else (ChannelEquilibrium,)
    layers = [m for m in backbone.modules() if isinstance(m, kinds) and getattr(m, 'track_running_stats', True)]
    ce_layers = [m for m in layers if isinstance(m, ChannelEquilibrium)]
    if not layers:
        raise ValueError(f'{type(backbone).__name__} has no layer to calibrate')
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in layers}
    buffers = [buffer for m in layers for buffer in m.buffers()]
    results = [buffer.clone() for buffer in buffers]
    count, sums = 0, [np.zeros(buffer.shape) for buffer in buffers]  # in NumPy: some devices do not support float64
    try:
        model.eval()
        for m in layers:
            m.train()
            m.momentum = 1.0  # so that the running values are the batch's own
        for batch in _limited(batches, num_batches):
            for buffer in buffers:
                buffer.zero_()  # a NaN would survive the update, even with momentum 1
            backbone(_images(model, batch))
            if not all(0 < ce.ir.running_scale < math.inf for ce in ce_layers):
                raise ValueError(f'batch {count + 1} has statistics that are not finite; look at its images')
            for total, buffer in zip(sums, buffers):
                total += _array(buffer)
            count += 1
        if not count:
            raise ValueError('no batch to calibrate with: the data loader is empty or num_batches is 0')
        for result, total in zip(results, sums):
            if result.is_floating_point():  # not BatchNorm's count of batches
                result.copy_(torch.from_numpy((total / count).astype(_array(result).dtype)))
                all_reduce(result, op='mean')
    finally:
        for m, training in modes.items():
            m.training = training
        for m, momentum in momenta.items():
            m.momentum = momentum
        for buffer, result in zip(buffers, results):
            buffer.copy_(result)
    return count


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.to('cpu', torch.promote_types(tensor.dtype, torch.float32)).numpy()  # numpy has no bfloat16


def _limited(batches: Iterable[Any], num_batches: int) -> Iterable[Any]:
    """Iterate over the first batches, with a progress bar on the first rank."""
    total = min(num_batches, len(batches)) if hasattr(batches, '__len__') else num_batches
    return track(islice(batches, num_batches), 'calibrating', total=total, disable=get_dist_info()[0] != 0)


def _images(model: nn.Module, batch: Any) -> Tensor:
    """Return a batch's image tensor as the model sees it in training."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    if isinstance(batch, Tensor) or preprocessor is None:
        return batch
    return preprocessor(batch, True)['inputs']
