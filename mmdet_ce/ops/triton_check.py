"""The check at first use: both passes of the Triton form against the torch form in float64, on the layer's device.

A kernel that a compiler gets wrong, or that cannot be built, must not train a network. The maps of the check are small,
ragged and in both memory formats, and their channels have means. No random generator is used and no other process is
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
from typing import Callable, Optional

import torch
from mmengine.logging import print_log
from torch import Tensor

from . import coefficients, maps
from .coefficients import Inputs, Options
from .processes import OneProcess

# Of the largest magnitude: of the maps, of the statistics and gradients of parameters.
BOUNDS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 5e-3), torch.float16: (5e-3, 5e-3)}
MAPS = (((1, 5, 13), torch.contiguous_format), ((2, 16, 24), torch.channels_last))  # N, H, W
DRIVER = Path('/proc/driver/nvidia/version')


def verdict(signature: tuple, triton_form: Callable, *layer: object) -> Optional[str]:
    """Return why the Triton form cannot be taken for a layer, or None.

    Args:
        signature: The layer's, with its device first.
        triton_form: A function that imports the form.
        layer: What ``dispatch.choose`` was given.
    """
    record = None
    with contextlib.suppress(OSError, RuntimeError):  # no home, no driver file: nothing is remembered
        record = _record(signature)
        if record.exists():
            return None
    _announce()
    try:
        reason = _disagreement(triton_form, *layer)
    except Exception as error:  # no compiler, no Python.h, no cache folder, too little shared memory, an old driver
        lines = str(error).strip().splitlines() or ['']
        return f'its kernels cannot be built or run ({type(error).__name__}: {lines[-1][:200]})'
    if reason is None and record is not None:
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            record.touch()
    return reason


def _record(signature: tuple) -> Path:
    """Return the file that says that layers of a signature have passed here."""
    import triton

    device, *layer = signature
    name = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    sources = [path.read_text() for path in sorted(Path(__file__).parent.glob('triton_*.py'))]
    facts = sources, torch.__version__, triton.__version__, DRIVER.read_text(), name, layer
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return folder / 'mmdet_ce' / hashlib.sha256(repr(facts).encode()).hexdigest()


@functools.lru_cache(maxsize=None)
def _announce() -> None:
    print_log('Channel Equilibrium: compiling and checking the Triton kernels, once a machine', logger='current')


@torch.no_grad()
def _disagreement(
    triton_form: Callable, x: Tensor, shortcut: Optional[Tensor], relu: bool, inputs: Inputs, options: Options
) -> Optional[str]:
    """Return where the Triton form departs from the torch form by more than its bound, or None."""
    form, numbers = triton_form(options), functools.partial(_numbers, device=x.device)
    inputs = Inputs(*(None if t is None else _input_like(t, *pair) for t, *pair in zip(inputs, Inputs._fields, SEEDS)))
    running = None
    if options.running is not None:
        whitening, scale = options.running
        eye = torch.eye(options.group_size, dtype=torch.float64, device=x.device)
        running = (eye + 0.1 * numbers(whitening.shape, 1)).to(whitening), (1 + 0.5 * numbers((1,), 2)).to(scale)
    options = options._replace(running=running, processes=OneProcess())
    for (n, h, w), memory_format in MAPS:
        shape = n, x.shape[1], h, w
        z, r, grad = (numbers(shape, seed).to(x.dtype).to(memory_format=memory_format) for seed in (3, 4, 5))
        z = z + 3 * numbers((1, x.shape[1], 1, 1), 6).to(x.dtype)
        r = None if shortcut is None else r
        actual_maps, actual_small = _both_passes(form, z, r, grad, relu, inputs, options)
        passed = actual_maps[0] > 0 if relu else 1  # where rounding decides the ReLU, the answer counts as given
        exact = options._replace(
            running=_doubles(running), map_dtype=torch.float64, dtype=torch.float64
        )
        ...
    return None
