"""What differs between the supported versions of torch, and nothing else.

Each entry says from which oldest supported torch on it can be removed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Callable

import torch

from .environment import version_of

TORCH = version_of(torch.__version__)

# what an older torch lacks -> the first that has it
FEATURES = {
    'torch.load as data by default': (2, 6),
    'torch.compile without a graph break': (2, 6),
    'torch.export and export to ONNX': (2, 6),
    'float16 under autocast on a CPU': (2, 4),
}
# torch 2.3 has both
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)
is_dynamo_compiling = getattr(torch.compiler, 'is_dynamo_compiling', lambda: False)


def missing_features(torch_version: tuple[int, int] = TORCH) -> list[str]:
    """Return what a version of torch lacks, each with the first version that has it."""
    return [f'{name} (torch {a}.{b})' for name, (a, b) in FEATURES.items() if torch_version < (a, b)]


def outside_graphs(function: Callable) -> Callable:
    """Keep a function out of the graphs of torch.compile that cannot trace it. Remove it when torch >= 2.6."""
    return function if TORCH >= FEATURES['torch.compile without a graph break'] else torch.compiler.disable(function)


def is_autocast_enabled(device_type: str) -> bool:
    """Return whether autocast is on for a type of device. Remove it when torch >= 2.4."""
    if TORCH >= (2, 4):  # torch.compile in torch 2.11 cannot trace the question whether a device type has an autocast
        has_autocast = is_compiling() or torch.amp.is_autocast_available(device_type)
        return has_autocast and torch.is_autocast_enabled(device_type)
    return torch.is_autocast_cpu_enabled() if device_type == 'cpu' else torch.is_autocast_enabled()


def without_autocast(device_type: str) -> AbstractContextManager:
    """Return a context in which autocast is off. Remove it when torch >= 2.4."""
    # torch.compile traces a backward pass as if autocast were off, and runs it where autocast is on
    is_needed = is_dynamo_compiling() or is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_needed else nullcontext()


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace a look at the switch
def is_tf32_allowed() -> bool:
    """Return whether CUDA may multiply float32 in TF32. From torch 2.9 on it is fp32_precision."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == 'tf32' if TORCH >= (2, 9) else matmul.allow_tf32
