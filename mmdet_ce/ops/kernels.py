"""Which form the operator takes: torch, or Triton on GPUs that it was run and tested on. Chosen here alone.

``MMDET_CE_KERNELS`` decides: ``auto`` (the default) takes Triton on a device class of ``TESTED_CAPABILITIES``,
``torch`` never, ``triton`` wherever the kernels can run. What was chosen and why is logged once a process.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple, Optional

import torch
from mmengine.logging import print_log
from torch import Tensor

from .. import compat
from . import coefficients, maps, precision

VARIABLE = 'MMDET_CE_KERNELS'
CHOICES = ('auto', 'torch', 'triton')
# Compute capabilities on which tests/test_kernels passed with the kernels as they are; docs/benchmarks.md has the runs.
# An earlier state passed on (9, 0), an H100; since then S has a unit and gate_backward_kernel is in parts.
TESTED_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()
LEAST_CAPABILITY = (8, 0)
LEAST_TRITON = (3, 3)
GROUP_SIZES = (16, 32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Forms(NamedTuple):
    """The modules that hold the passes over a map and the small matrices."""

    maps: ModuleType
    coefficients: ModuleType


TORCH = Forms(maps, coefficients)


def choose(x: Tensor, group_size: int, num_iterations: int, one_process: bool) -> Forms:
    """Return the form for a map.

    Args:
        x: The map, (N, C, H, W).
        group_size: Channels d of a group.
        num_iterations: Newton steps T.
        one_process: Whether the batch is that of this process alone; otherwise the small matrices are torch's.

    Raises:
        ValueError: If the environment variable has another value than the three.
    """
    if (
        group_size not in GROUP_SIZES
        or x.dtype not in DTYPES
        or num_iterations > precision.MAX_FLOAT32_ITERATIONS
        or x.numel() >= 2**31 * x.shape[0]
        or precision.is_tracing()
        or compat.is_compiling()  # the kernels were not run under torch.compile, which fuses the torch form
        or not _triton_on(x.device)
    ):
        return TORCH
    from . import triton_coefficients, triton_maps

    return Forms(triton_maps, triton_coefficients if one_process else coefficients)


@functools.lru_cache(maxsize=None)
def _triton_on(device: torch.device) -> bool:
    """Decide for a device, once, and say so."""
    choice = os.environ.get(VARIABLE, 'auto')
    if choice not in CHOICES:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(CHOICES)}, got {choice!r}')
    if device.type == 'meta' or (device.type != 'cuda' and choice == 'auto'):
        return False
    reason = f'{VARIABLE}=torch' if choice == 'torch' else _obstacle(device, choice)
    if device.type == 'cuda' or choice == 'triton':
        name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
        form = f'torch ({reason})' if reason else f'Triton ({VARIABLE}={choice})'
        print_log(f'Channel Equilibrium on {name}: {form}', logger='current')
    return not reason


def _obstacle(device: torch.device, choice: str) -> Optional[str]:
    """Return why Triton cannot be taken on a device, or None."""
    if importlib.util.find_spec('triton') is None:
        return 'triton is not installed'
    import triton

    if tuple(int(part) for part in triton.__version__.split('.')[:2]) < LEAST_TRITON:
        return f'triton {triton.__version__} is older than {".".join(map(str, LEAST_TRITON))}'
    if device.type != 'cuda':
        return None if os.environ.get('TRITON_INTERPRET') == '1' else 'the kernels need CUDA, or TRITON_INTERPRET=1'
    if torch.version.hip is not None:
        return 'the kernels were not run on ROCm'
    return capability_obstacle(torch.cuda.get_device_capability(device), choice)


def capability_obstacle(capability: tuple[int, int], choice: str) -> Optional[str]:
    """Return why Triton cannot be taken on GPUs of a compute capability, or None."""
    if capability < LEAST_CAPABILITY:
        return f'compute capability {capability[0]}.{capability[1]} is below 8.0'
    if choice == 'auto' and capability not in TESTED_CAPABILITIES:
        return f'not tested on compute capability {capability[0]}.{capability[1]}; {VARIABLE}=triton takes Triton'
    return None
