"""The four passes over a map as Triton kernels.

One program reduces or multiplies a stretch of positions of one channel group of one sample. Both memory formats are
read and written by their strides, without a copy. The two reductions have two stages and no atomics, so they are
deterministic: each program writes the sums of its stretch, and these are merged in a fixed order.

Products of 16-bit maps run on the tensor cores in TF32, which is as exact as the maps are; those of float32 maps in
three TF32 products, which is as exact as float32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional

import torch
import triton
from torch import Tensor

from . import triton_map_kernels as kernels
from .maps import is_channels_last


class Tiling(NamedTuple):
    """How a kernel covers a map."""

    block: int  # positions that a program holds at once
    num_warps: int
    programs: int  # to aim at, for each multiprocessor


# by pass and group size; the fastest of a sweep on an H100
TILINGS = {
    'reduce': {16: Tiling(64, 1, 8), 32: Tiling(64, 2, 8), 64: Tiling(64, 4, 2)},
    'variance': {16: Tiling(128, 1, 8), 32: Tiling(128, 2, 8), 64: Tiling(128, 8, 2)},
    'apply': {16: Tiling(128, 4, 16), 32: Tiling(128, 4, 16), 64: Tiling(32, 4, 16)},
    'reduce_backward': {16: Tiling(64, 1, 8), 32: Tiling(64, 2, 8), 64: Tiling(64, 4, 2)},
    'apply_backward': {16: Tiling(128, 4, 16), 32: Tiling(128, 4, 16), 64: Tiling(32, 4, 8)},
}
MERGED_AT_ONCE = 16  # partial sums that a program of the second stage holds


class StridedMap(NamedTuple):
    """A map as the kernels see it: (N, C, H, W), contiguous or channels_last."""

    values: Tensor
    group_size: int
    shape: tuple[int, int, int]  # N, G, L
    channels_last: bool


def group(
    x: Tensor,
    group_size: int,
    dtype: Optional[torch.dtype] = None,
    channels_last: Optional[bool] = None,
    with_scratch: bool = False,
) -> StridedMap:
    """Describe a map, (N, C, H, W), to the kernels; see ``maps.group``.

    It is copied only if it has neither memory format, or another than ``channels_last`` asks for. The kernels compute
    in float32 and need no scratch.
    """
    n, c, h, w = x.shape
    if channels_last is None:
        channels_last = is_channels_last(x)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return StridedMap(x, group_size, (n, c // group_size, h * w), channels_last)


def reduce(x: StridedMap, with_covariance: bool) -> tuple[Tensor, Tensor]:
    """Return the means of each sample's positions and the products summed about them; see ``maps.reduce``."""
    (n, g, length), d = x.shape, x.group_size
    grid, sizes, constants = _plan('reduce' if with_covariance else 'variance', x)
    count, square = grid[1], (d, d) if with_covariance else (d,)
    empty = functools.partial(x.values.new_empty, dtype=torch.float32)
    means, scatter = empty((n, g, d)), empty((n, g, *square))
    partial = (means, scatter) if count == 1 else (empty((n * g, count, d)), empty((n * g, count, *square)))
    with torch.cuda.device_of(means):
        kernels.reduce_kernel[grid](x.values, *partial, *sizes, with_covariance, **constants)
        if count > 1:
            rows = 256 // d if with_covariance else d
            kernels.merge_moments_kernel[(n * g, d // rows)](
                *partial, means, scatter, length, sizes[-1], count, with_covariance, d, rows, MERGED_AT_ONCE
            )
    return means, scatter


def apply(
    x: StridedMap, matrix: Tensor, constant: Optional[Tensor], shortcut: Optional[Tensor] = None, relu: bool = False
) -> Tensor:
    """Return relu(M x + c + shortcut); see ``maps.apply``."""
    grid, sizes, constants = _plan('apply', x)
    out = torch.empty_like(x.values)
    if shortcut is not None:
        shortcut = group(shortcut.to(out.dtype), x.group_size, channels_last=x.channels_last).values
    flags = constant is not None, shortcut is not None, relu
    with torch.cuda.device_of(out):
        kernels.apply_kernel[grid](
            x.values, _small(matrix), _small(constant), shortcut, out, *sizes, *flags, **constants
        )
    return out


def reduce_backward(
    grad: Tensor, x: StridedMap, out: Optional[Tensor] = None, with_constant: bool = True
) -> tuple[Tensor, Tensor, Tensor, StridedMap]:
    """Return the gradients of M and of its constant, and that of the shortcut; see ``maps.reduce_backward``."""
    (n, g, _), d = x.shape, x.group_size
    grid, sizes, constants = _plan('reduce_backward', x)
    grad = group(grad, d, channels_last=x.channels_last)
    # brought into the format of x too: save_on_cpu, for one, gives a saved tensor back in another
    out = None if out is None else group(out, d, channels_last=x.channels_last).values
    dy = grad if out is None else grad._replace(values=torch.empty_like(grad.values))
    parts = n * g * d * d, n * g * d  # what a program of the first stage adds to dM, and to dc
    partial = x.values.new_empty((grid[1], sum(parts)), dtype=torch.float32)
    with torch.cuda.device_of(partial):
        kernels.reduce_backward_kernel[grid](
            x.values, grad.values, out, dy.values, *partial.split(parts, 1), sum(parts), *sizes, out is not None,
            **constants,
        )  # fmt: skip
    d_matrix, d_constant = (partial[0] if grid[1] == 1 else partial.sum(0)).split(parts)
    return d_matrix.view(n, g, d, d), d_constant.view(n, g, d), dy.values, dy


def apply_backward(dy: StridedMap, x: StridedMap, matrix: Tensor, k_matrix: Tensor, k_vector: Tensor) -> Tensor:
    """Return dx = M^T dy + K x - k; see ``maps.apply_backward``."""
    grid, sizes, constants = _plan('apply_backward', x)
    dx, small = torch.empty_like(x.values), map(_small, (matrix, k_matrix, k_vector))
    with torch.cuda.device_of(dx):
        kernels.apply_backward_kernel[grid](dy.values, x.values, *small, dx, *sizes, k_matrix.dim() == 4, **constants)
    return dx


def _small(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """Return a small matrix as the kernels read it."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def tiling_of(name: str, d: int, dtype: torch.dtype) -> Tiling:
    """Return how the kernel of a pass covers a map; half as much of a float32 one where shared memory would not do."""
    tiling = TILINGS[name][d]
    halved = d >= 32 and dtype == torch.float32 and name.endswith('backward')
    return tiling._replace(block=tiling.block // 2) if halved else tiling


def _plan(name: str, x: StridedMap) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, Any]]:
    """Return what a launch of a pass is given: the grid, its sizes, and the constants that it is compiled for.

    The positions are shared out among enough programs to fill the device, but no more than there are blocks.
    """
    (n, g, length), dtype, device = x.shape, x.values.dtype, x.values.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1
    tiling, align = tiling_of(name, x.group_size, dtype), min(length & -length, 16)  # 16, or what power of 2 divides L
    blocks = triton.cdiv(length, tiling.block)
    wanted = triton.cdiv(tiling.programs * processors, n * g)
    blocks_of_program = triton.cdiv(blocks, min(wanted, blocks))
    constants = dict(
        d=x.group_size,
        block=tiling.block,
        channels_last=x.channels_last,
        align=align,
        precision='tf32x3' if dtype == torch.float32 else 'tf32',
        num_warps=tiling.num_warps,
    )
    grid = n * g, triton.cdiv(blocks, blocks_of_program)
    return grid, (g, length // align, blocks_of_program * tiling.block), constants
