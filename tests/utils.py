"""Helpers shared by the tests."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import ReferenceOutput, channel_equilibrium_reference
from torch.overrides import TorchFunctionMode

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.compat import FEATURES, TORCH

# mmdet's name of each backbone, and arguments that keep it small
FAMILY = [
    ('ResNet', dict(depth=18, base_channels=16)),
    ('ResNetV1d', dict(depth=50, base_channels=16, stem_channels=16)),
    ('ResNeXt', dict(depth=50, groups=4, base_width=4, base_channels=16)),
    ('MobileNetV2', dict(widen_factor=0.5)),
]


def needs(feature: str) -> pytest.MarkDecorator:
    """Skip tests of what an older torch lacks, one of ``mmdet_ce.compat.FEATURES``."""
    since = FEATURES[feature]
    return pytest.mark.skipif(TORCH < since, reason=f'{feature} needs torch {since[0]}.{since[1]}: {torch.__version__}')


def call(main: Callable[[], None], *arguments: object) -> str | int | None:
    """Run the command line of a tool in this process; return None, or the message or status that it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['tool', *map(str, arguments)])
        try:
            main()
        except SystemExit as error:
            return error.code


def assert_agree(actual: torch.Tensor, expected, tolerance: float, name: str = '') -> None:
    """Assert that the largest difference is at most ``tolerance`` times the largest expected magnitude."""
    expected = torch.as_tensor(np.asarray(expected)) if not torch.is_tensor(expected) else expected
    assert actual.shape == expected.shape, f'{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}'
    assert torch.isfinite(actual).all(), f'{name}: not finite'
    error = (actual.double() - expected.double()).abs().max().item()
    limit = tolerance * max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
    assert error <= limit, f'{name}: largest difference {error:.3g}, allowed {limit:.3g}'


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter and running value of a CE module a value that no initialization gives."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith('running_whitening'):
            value = 2 * torch.eye(tensor.shape[-1]) + 0.05 * (noise + noise.transpose(1, 2))
        elif name.endswith(('running_scale', 'running_var')):
            value = 0.5 + noise.abs()
        elif name.endswith('norm.weight'):
            value = 1 + 0.2 * noise
        elif tensor.dim() > 1:
            value = noise / tensor[0].numel() ** 0.5
        else:
            value = 0.5 * noise
        tensor.data.copy_(value)
    return module


def unset_statistics(forward: Callable[[], object]) -> list[str]:
    """Return the warnings about statistics that no data ever updated, of all that a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        forward()
    return [str(w.message) for w in caught if 'statistics that no data ever updated' in str(w.message)]


def reference(ce: ChannelEquilibrium, x: torch.Tensor, **kwargs: object) -> ReferenceOutput:
    """Run the oracle with the parameters of ``ce``, in its mode and dtype; further arguments are the oracle's."""
    running = {} if ce.training else dict(running_whitening=ce.bd.running_whitening, running_scale=ce.ir.running_scale)
    return channel_equilibrium_reference(
        x,
        ce.theta,
        *ce.ir.gate_parameters,
        group_size=ce.group_size,
        num_iterations=ce.bd.num_iterations,
        eps=ce.bd.eps,
        alpha=ce.alpha,
        **running,
        **kwargs,
    )


def is_running(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 20) -> bool:
    """Return whether a condition came true in so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


class NoFloat64(TorchFunctionMode):
    """A device without float64, as Apple's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert not (torch.is_tensor(out) and out.dtype == torch.float64), function
        return out
