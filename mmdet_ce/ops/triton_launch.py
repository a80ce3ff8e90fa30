"""Start Triton kernels at little cost for the host.

Triton looks at every argument of every launch; with some twenty arguments that takes longer than the kernel. Here a
kernel that was compiled for a signature is started with plain addresses.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

_compiled: dict[tuple, Any] = {}


class Slice(NamedTuple):
    """A part of a buffer that only kernels see: a tensor of its own would take the host longer than the kernel."""

    buffer: Tensor  # float32
    offset: int
    size: int

    def tensor(self) -> Tensor:
        """Return it as a tensor of one axis."""
        return self.buffer[self.offset : self.offset + self.size]


def carve(buffer: Tensor, *shapes: tuple[int, ...]) -> list[Slice]:
    """Divide a buffer of ``room_for(*shapes)`` numbers into parts of these shapes, each aligned to 16 bytes."""
    slices, offset = [], 0
    for shape in shapes:
        size = math.prod(shape)
        slices.append(Slice(buffer, offset, size))
        offset += (size + 3) & ~3
    return slices


def room_for(*shapes: tuple[int, ...]) -> int:
    """Return the numbers that ``carve`` needs for these shapes."""
    return sum((math.prod(shape) + 3) & ~3 for shape in shapes)


def start(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    num_warps: int = 4,
) -> None:
    """Start a kernel on the current stream of its tensors' device.

    Args:
        kernel: A function under ``triton.jit`` whose constexpr parameters come last.
        grid: Programs along one or two axes.
        arguments: Tensors, slices, numbers, or None; a tensor or a slice first.
        constants: The values of the constexpr parameters.
        num_warps: Warps of a program.
    """
    if isinstance(kernel, InterpretedFunction):
        kernel[grid](*_tensors(arguments), *constants, num_warps=num_warps)
        return
    device = arguments[0].buffer.device if type(arguments[0]) is Slice else arguments[0].device
    signature: list[Any] = [kernel.fn, device.index, num_warps, constants]
    plain: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is Slice:
            signature.append(kind)
            plain.append(argument.buffer.data_ptr() + 4 * argument.offset)
        elif kind is int:  # what Triton compiles for: 1, multiples of 16, 64 bits
            signature.append(1 if argument == 1 else (argument % 16 == 0, argument >= 2**31))
            plain.append(argument)
        elif kind is float or argument is None:
            signature.append(kind)
            plain.append(argument)
        else:
            address = argument.data_ptr()
            signature.append((argument.dtype, address % 16 == 0))
            plain.append(address)
    key = tuple(signature)
    compiled = _compiled.get(key)
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*_tensors(arguments), *constants, num_warps=num_warps)
    elif compiled is None:
        _compiled[key] = kernel[grid](*_tensors(arguments), *constants, num_warps=num_warps)
    else:
        compiled[(*grid, 1, 1)[:3]](*plain, *constants)


def _tensors(arguments: tuple[Any, ...]) -> list[Any]:
    return [argument.tensor() if type(argument) is Slice else argument for argument in arguments]
