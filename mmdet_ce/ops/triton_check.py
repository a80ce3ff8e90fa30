"""The check at first use: both passes of the Triton form against the torch form in float64, on the layer's device.

A kernel that a compiler gets wrong, or that cannot be built, must not train a network. The maps of the check are small,
ragged and in both memory formats, and their channels have means. No random generator is used, and no other process is
waited for. A check that passed is remembered as an empty file in ``~/.cache/mmdet_ce``; its name is a hash of the
kernels, the versions, the driver, the device and the layer's signature.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from mmengine.logging import print_log
from torch import Tensor

from .. import compat
from . import coefficients, maps
from .records import Inputs, Options

# Errors allowed, relative to the largest magnitude: of y, dx and the shortcut's gradient; of all else.
BOUNDS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 5e-3), torch.float16: (5e-3, 5e-3)}
MAPS = ((1, 5, 13, torch.contiguous_format), (2, 16, 24, torch.channels_last))  # N, H, W
DRIVER = Path('/proc/driver/nvidia/version')
_say_once = functools.lru_cache(maxsize=None)(print_log)


def verdict(signature: tuple, triton_form: Callable, *layer: Any) -> Optional[str]:
    """Return why the form cannot be taken for a layer, or None; ``layer`` is what ``dispatch.choose`` was given."""
    record = None
    with contextlib.suppress(OSError, RuntimeError):  # no driver file, no home: nothing is remembered
        record = _record(signature)
        if record.exists():
            return None
    _say_once('Channel Equilibrium: compiling and checking its Triton kernels, once a machine', 'current')
    try:
        with torch.no_grad(), compat.without_autocast(layer[0].device.type):
            reason = _disagreement(triton_form, *layer)
    except Exception as error:  # no compiler, no Python.h, no cache folder, too little shared memory, an old driver
        lines = str(error).strip().splitlines() or ['']
        return f'its kernels cannot be built or run: {type(error).__name__}: {lines[-1][:200]}'
    if reason is None and record is not None:
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            record.touch()
    return reason


def _record(signature: tuple) -> Path:
    """Return the file that says that layers of a signature have passed on this machine."""
    import triton

    device, *layer = signature
    sources = [path.read_text() for path in sorted(Path(__file__).parent.glob('*.py'))]
    gpu = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), DRIVER.read_text()
    facts = repr((sources, torch.__version__, triton.__version__, gpu, layer))
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return folder / 'mmdet_ce' / hashlib.sha256(facts.encode()).hexdigest()


def _disagreement(
    triton_form: Callable, x: Tensor, shortcut: Optional[Tensor], relu: bool, inputs: Inputs, options: Options
) -> Optional[str]:
    """Return what of the Triton form departs from the torch form by more than its bound, or None."""
    form, channels = triton_form(options), x.shape[1]
    inputs = Inputs(*(None if t is None else _like(t, seed) for seed, t in enumerate(inputs)))
    running = options.running and tuple(map(_like, options.running, range(2)))
    options = options._replace(running=running, process_group=None)
    exact_options = options._replace(running=running and _double(running), map_dtype=torch.float64, dtype=torch.float64)
    for n, h, w, memory_format in MAPS:
        z, r, grad = (_numbers((n, channels, h, w), seed, x.device) for seed in range(3))
        grad += z  # sums over a map of independent numbers would cancel, and so have large relative errors
        z += 3 * _numbers((1, channels, 1, 1), 3, x.device)
        z, r, grad = (t.to(x.dtype).to(memory_format=memory_format) for t in (z, r, grad))
        r = None if shortcut is None else r
        actual = _both_passes(form, z, r, grad, relu, inputs, options)
        passed = actual['y'] > 0 if relu else 1  # rounding may flip the ReLU near 0, so both use Triton's mask
        doubles, exact_inputs = _double((z, r, grad * passed)), Inputs(*_double(inputs))
        exact = _both_passes((maps, coefficients), *doubles, False, exact_inputs, exact_options)
        exact['y'] *= passed
        for name, value in exact.items():
            error = ((actual[name] - value).abs().max() / value.abs().max()).item()
            bound = BOUNDS[x.dtype][name not in ('y', 'dx', 'd_shortcut')]
            if not error <= bound:
                return f'{name} is off by {error:.0e} of its size (bound {bound:.0e}; {channels} channels, {x.dtype})'
    return None


def _both_passes(
    form: tuple, z: Tensor, shortcut: Optional[Tensor], grad: Tensor, relu: bool, inputs: Inputs, options: Options
) -> dict[str, Tensor]:
    """Return what a form computes from a map and a gradient, by name."""
    (maps, coefficients), length = form, z.shape[2] * z.shape[3]
    grouped = maps.group(z, options.group_size, options.map_dtype)
    m, s = maps.reduce(grouped, options.running is None)
    c = coefficients.coefficients(m, s, length, inputs, options)
    y = maps.apply(grouped, c.matrix, c.constant, shortcut, relu)
    has_norm = inputs.norm_running_mean is not None
    d_matrix, d_constant, d_shortcut, dy = maps.reduce_backward(grad, grouped, y if relu else None, has_norm)
    *k, d_inputs = coefficients.coefficients_backward(c.saved, length, d_matrix, d_constant, inputs, options)
    dx = maps.apply_backward(dy, grouped, c.matrix, *k)
    results = dict(y=y, dx=dx, d_shortcut=d_shortcut)
    if options.running is None:
        results.update(mean=c.mean, whitening=c.whitening, scale=c.scale)
    results.update((f'd_{name}', d) for name, d in zip(Inputs._fields[2:], d_inputs) if d is not None)
    return results


def _like(tensor: Tensor, seed: int) -> Tensor:
    """Return numbers for a tensor of the layer: weights of unit variance, P near 1, all else between 0.5 and 1.5."""
    numbers, size = _numbers(tensor.shape, seed + 4, tensor.device), tensor.shape[-1]
    if tensor.dim() == 2:
        numbers *= (3 / size) ** 0.5
    else:
        numbers = numbers / 2 + 1 if tensor.dim() == 1 else numbers / 10 + torch.eye(size, device=tensor.device)
    return numbers.to(tensor.dtype)


def _numbers(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Return numbers in (-1, 1) by a sine, in float64: a generator would move the user's stream of random numbers."""
    index = torch.arange(math.prod(shape), dtype=torch.float64, device=device)
    return (torch.sin(index * 12.9898 + seed) * 43758.5453).frac().view(shape)


def _double(tensors: tuple[Optional[Tensor], ...]) -> tuple[Optional[Tensor], ...]:
    return tuple(None if t is None else t.double() for t in tensors)
