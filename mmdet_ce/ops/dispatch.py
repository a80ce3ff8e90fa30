"""Which form of the operator a layer takes: torch, or Triton on GPUs. This is the only place that chooses.

``MMDET_CE_KERNELS`` decides: ``auto`` (the default) takes Triton where it runs and agrees with the torch form, which
``triton_check`` finds out at first use; ``torch`` never takes it; ``triton`` raises where the device cannot run it or a
check fails. Layers that the kernels are not made for (``_is_covered``) take torch in any case. What is taken is logged,
and a check that fails is a warning.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType
from typing import NamedTuple, Optional

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .. import compat
from . import coefficients, maps, precision, triton_check
from .records import Inputs, Options

VARIABLE = 'MMDET_CE_KERNELS'
CHOICES = ('auto', 'torch', 'triton')
DEVICE_TYPE = 'cuda'  # the tests take Triton's interpreter for a GPU: 'cpu'
LEAST_CAPABILITY = (8, 0)
LEAST_TRITON = (3, 3)
GROUP_SIZES = (16, 32, 64)

_verdicts: dict[tuple, Optional[str]] = {}  # by a layer's signature: why Triton is not taken, or None
_reported: set[tuple] = set()


class Forms(NamedTuple):
    """The modules that hold the passes over a map and the small matrices."""

    maps: ModuleType
    coefficients: ModuleType


TORCH = Forms(maps, coefficients)


def choose(x: Tensor, shortcut: Optional[Tensor], relu: bool, inputs: Inputs, options: Options) -> Forms:
    """Return the form for a layer; the arguments are those of the layer.

    Raises:
        ValueError: If the environment variable has another value than the three.
        RuntimeError: If it is ``triton``, and Triton cannot be taken on the device or for the layer.
    """
    if precision.is_tracing() or compat.is_compiling():  # torch.compile fuses the torch form
        return TORCH
    choice = os.environ.get(VARIABLE, 'auto')
    if choice not in CHOICES:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(CHOICES)}, got {choice!r}')
    if choice == 'torch' or (choice == 'auto' and x.device.type != DEVICE_TYPE) or not _is_covered(x, inputs, options):
        return TORCH
    reason = device_obstacle(x.device) or _layer_obstacle(x, shortcut, relu, inputs, options)
    if reason is not None and choice == 'triton':
        raise RuntimeError(f'{VARIABLE}=triton, but {reason}')
    _report(x.device, choice, reason)
    return TORCH if reason else _triton_form(options)


def _is_covered(x: Tensor, inputs: Inputs, options: Options) -> bool:
    """Return whether the kernels are made for such a layer."""
    return (
        options.group_size in GROUP_SIZES
        and inputs.logits is None
        and len(inputs.ln_weight) > 2  # through LayerNorm of one or two units comes no gradient that could be checked
        and x.dtype in triton_check.BOUNDS
        and type(x) in (Tensor, nn.Parameter)  # a fake tensor has no memory
        and options.num_iterations <= precision.MAX_FLOAT32_ITERATIONS
        and x.numel() < 2**31 * x.shape[0]
    )


@functools.lru_cache(maxsize=None)
def device_obstacle(device: torch.device) -> Optional[str]:
    """Return why the kernels cannot run on a device, or None. Triton is imported last: it may be broken."""
    if device.type != DEVICE_TYPE or torch.version.hip is not None:
        return f'the map is on {device.type if torch.version.hip is None else "ROCm"}, and the kernels need CUDA'
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f'compute capability {capability[0]}.{capability[1]} is below {".".join(map(str, LEAST_CAPABILITY))}'
    try:
        import triton
    except Exception as error:
        return f'Triton cannot be imported ({error})'
    if compat.version_of(triton.__version__) < LEAST_TRITON:
        return f'Triton {triton.__version__} is older than {".".join(map(str, LEAST_TRITON))}'
    return None


def _layer_obstacle(
    x: Tensor, shortcut: Optional[Tensor], relu: bool, inputs: Inputs, options: Options
) -> Optional[str]:
    """Return why Triton is not taken for a layer, or None: what its check gives, once a process and signature."""
    has = tuple(t is not None for t in (inputs.norm_running_mean, inputs.norm_weight, inputs.alpha, shortcut))
    mode = relu, options.running is None, options.process_group is None
    sizes = x.shape[1], options.group_size, len(inputs.ln_weight), options.num_iterations
    signature = x.device, x.dtype, inputs.theta.dtype, *sizes, *has, *mode
    if signature not in _verdicts:
        if torch.cuda.is_current_stream_capturing():  # not remembered: the next call checks
            return 'a layer ran first while a CUDA graph was captured: run it once before'
        _verdicts[signature] = triton_check.verdict(signature, _triton_form, x, shortcut, relu, inputs, options)
    return _verdicts[signature]


def _triton_form(options: Options) -> Forms:
    """Return the Triton form. Where several processes share statistics, the small matrices are torch's."""
    from . import triton_coefficients, triton_maps

    return Forms(triton_maps, coefficients if options.process_group else triton_coefficients)


def _report(device: torch.device, choice: str, reason: Optional[str]) -> None:
    """Say once a process, device and reason which form is taken; warn where a check has failed."""
    if (device, reason) in _reported:
        return
    _reported.add((device, reason))
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    form = f'Triton ({VARIABLE}={choice})' if reason is None else f'torch ({reason})'
    if reason is None or device_obstacle(device):
        print_log(f'Channel Equilibrium on {name}: {form}', logger='current')
    else:  # a warning, which every process shows: mmengine's logger is silent but for the first
        warnings.warn(f'Channel Equilibrium on {name}: {form}', stacklevel=2)
