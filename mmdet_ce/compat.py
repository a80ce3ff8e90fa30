"""What differs between the supported versions of torch, and nothing else.

Each entry names the oldest torch that does without it: once nothing older is supported, the entry goes.
"""

from __future__ import annotations

import re
import warnings
from typing import Callable

import torch
from torch.nn.modules import module as _module


def version_of(text: str) -> tuple[int, int]:
    """Return major and minor of a version: (2, 13) for '2.13.0+cpu'."""
    major, minor = re.findall(r'\d+', text)[:2]
    return int(major), int(minor)


TORCH = version_of(torch.__version__)

# what an older torch lacks -> the first that has it
FEATURES = {
    'torch.load as data by default': (2, 6),
    'torch.compile without a graph break': (2, 6),
    'torch.export and export to ONNX': (2, 6),
    'the Triton form on a GPU': (2, 7),
    'float16 under autocast on a CPU': (2, 4),
    'training of a float16 CE layer on a CPU': (2, 1),
}


def missing_features(torch_version: tuple[int, int] = TORCH) -> list[str]:
    """Return what a version of torch lacks, each with the first version that has it."""
    return [f'{name} (torch {a}.{b})' for name, (a, b) in FEATURES.items() if torch_version < (a, b)]


def warn_of_torch_load(torch_version: tuple[int, int] = TORCH) -> None:
    """Say what is left to torch.load, where that runs what a file says. torch 2.6: it does so only if told to."""
    if torch_version < (2, 6):
        warnings.warn(
            f'torch.load of torch {torch_version[0]}.{torch_version[1]} runs what a checkpoint says. Files and http(s) '
            'addresses that mmengine loads are read as data, since mmdet_ce is imported; other addresses '
            '(torchvision://, open-mmlab://, s3://) and code that calls torch.load are not: take what you trust from '
            'there, or torch 2.6 and later (docs/checkpoints.md)',
            stacklevel=2,
        )


def is_compiling() -> bool:
    """Return whether torch.compile or torch.export is tracing. torch 2.3: torch.compiler.is_compiling."""
    return TORCH >= (2, 3) and torch.compiler.is_compiling()


def is_dynamo_compiling() -> bool:
    """Return whether torch.compile is tracing. torch 2.3: torch.compiler.is_dynamo_compiling."""
    return TORCH >= (2, 3) and torch.compiler.is_dynamo_compiling()


def outside_graphs(function: Callable) -> Callable:
    """Keep a function out of the graphs of torch.compile that cannot trace it. torch 2.6: nothing is kept out."""
    if TORCH >= FEATURES['torch.compile without a graph break']:
        return function
    import torch._dynamo

    return torch._dynamo.disable(function)


def assume_constant_result(function: Callable) -> Callable:
    """Let torch.compile take a result for a constant. torch 2.1: torch.compiler.assume_constant_result."""
    return torch.compiler.assume_constant_result(function) if TORCH >= (2, 1) else function


def is_autocast_enabled(device_type: str) -> bool:
    """Return whether autocast is on for a type of device. torch 2.4: torch.is_autocast_enabled(device_type)."""
    if TORCH >= (2, 4):
        # torch.compile in torch 2.11 cannot trace the question whether a device type has an autocast
        available = is_compiling() or torch.amp.is_autocast_available(device_type)
        return available and torch.is_autocast_enabled(device_type)
    switches = {'cuda': torch.is_autocast_enabled, 'cpu': torch.is_autocast_cpu_enabled}
    return device_type in switches and switches[device_type]()


@assume_constant_result  # torch 2.11 cannot trace a look at the switch
def is_tf32_allowed() -> bool:
    """Return whether CUDA may multiply float32 in TF32. torch 2.9: fp32_precision; the old switch can raise there."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == 'tf32' if TORCH >= (2, 9) else matmul.allow_tf32


def has_global_hooks() -> bool:
    """Return whether hooks of every module are registered. torch 2.6: torch.nn.modules.module has the function."""
    if TORCH >= (2, 6):
        return _module._has_any_global_hook()
    hooks = ('forward_pre', 'forward', 'backward_pre', 'backward')
    return any(getattr(_module, f'_global_{kind}_hooks') for kind in hooks)
