"""The four passes over a map as Triton kernels.

One program reduces or multiplies a stretch of positions of one channel group of one sample. Both memory formats are
read and written by their strides, without a copy. The two reductions have two stages and no atomics, so they are
deterministic: each program writes the sums of its stretch, and a second kernel merges these in a fixed order.

Products of 16-bit maps run on the tensor cores in TF32, which is as exact as the maps are; those of float32 maps in
three TF32 products, which is as exact as float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch
import triton
from torch import Tensor

from . import triton_map_kernels as kernels
from .triton_launch import Slice, carve, room_for, start


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


class Stretches(NamedTuple):
    """How the positions of a map are shared out among programs."""

    length: int  # positions of a program, a multiple of the block
    count: int  # programs for each sample and group


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
    channels_last = not x.is_contiguous() if channels_last is None else channels_last
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return StridedMap(x, group_size, (n, c // group_size, h * w), channels_last)


def reduce(x: StridedMap, with_covariance: bool) -> tuple[Tensor, Tensor]:
    """Return the means of each sample's positions and the products summed about them; see ``maps.reduce``."""
    (n, g, length), d = x.shape, x.group_size
    tiling = tiling_of('reduce' if with_covariance else 'variance', d, x.values.dtype)
    stretch = _stretches(n * g, length, tiling, x.values.device)
    means = x.values.new_empty((n, g, d), dtype=torch.float32)
    scatter = means.new_empty((n, g, d, d) if with_covariance else (n, g, d))
    partial = means, scatter
    if stretch.count > 1:
        partial = _carved(means, (stretch.count, means.numel()), (stretch.count, scatter.numel()))
    start(
        kernels.reduce_kernel, (n * g, stretch.count), (x.values, *partial, g, length, stretch.length),
        (d, tiling.block, x.channels_last, with_covariance, _align(length), _precision(x)), tiling.num_warps,
    )  # fmt: skip
    if stretch.count == 1:
        return means, scatter
    rows = 256 // d if with_covariance else d
    start(
        kernels.merge_moments_kernel, (n * g, d // rows),
        (*partial, means, scatter, length, stretch.length, stretch.count), (d, rows, MERGED_AT_ONCE, with_covariance),
    )  # fmt: skip
    return means, scatter


def apply(
    x: StridedMap, matrix: Tensor, constant: Optional[Tensor], residual: Optional[Tensor] = None, relu: bool = False
) -> Tensor:
    """Return relu(M x + c + residual); see ``maps.apply``."""
    (n, g, length), d = x.shape, x.group_size
    tiling = tiling_of('apply', d, x.values.dtype)
    stretch = _stretches(n * g, length, tiling, x.values.device)
    out = torch.empty_like(x.values)
    if residual is not None:
        memory_format = torch.channels_last if x.channels_last else torch.contiguous_format
        residual = residual.to(out.dtype).contiguous(memory_format=memory_format)
    start(
        kernels.apply_kernel, (n * g, stretch.count),
        (x.values, _small(matrix), _small(constant), residual, out, g, length, stretch.length),
        (
            d, tiling.block, x.channels_last, constant is not None, residual is not None, relu, _align(length),
            _precision(x),
        ), tiling.num_warps,
    )  # fmt: skip
    return out


def reduce_backward(
    grad: Tensor, x: StridedMap, out: Optional[Tensor] = None, with_constant: bool = True
) -> tuple[Tensor, Tensor, Tensor, StridedMap]:
    """Return the gradients of M and of its constant, and that of the shortcut; see ``maps.reduce_backward``."""
    (n, g, length), d = x.shape, x.group_size
    grad = group(grad, d, channels_last=x.channels_last)
    tiling = tiling_of('reduce_backward', d, x.values.dtype)
    stretch = _stretches(n * g, length, tiling, x.values.device)
    dy = grad if out is None else grad._replace(values=torch.empty_like(grad.values))
    products = x.values.new_empty((n, g, d, d), dtype=torch.float32)
    sums = products.new_empty((n, g, d))
    partial = products, sums
    if stretch.count > 1:
        partial = _carved(products, (stretch.count, products.numel()), (stretch.count, sums.numel()))
    start(
        kernels.reduce_backward_kernel, (n * g, stretch.count),
        (x.values, grad.values, out, dy.values, *partial, g, length, stretch.length),
        (d, tiling.block, x.channels_last, out is not None, _align(length), _precision(x)), tiling.num_warps,
    )  # fmt: skip
    if stretch.count == 1:
        return products, sums, dy.values, dy
    rows = 256 // d
    start(
        kernels.merge_sums_kernel, (n * g, d // rows), (*partial, products, sums, stretch.count),
        (d, rows, MERGED_AT_ONCE),
    )  # fmt: skip
    return products, sums, dy.values, dy


def apply_backward(dy: StridedMap, x: StridedMap, matrix: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return dx = M^T dy + K x - k; see ``maps.apply_backward``."""
    (n, g, length), d = x.shape, x.group_size
    tiling = tiling_of('apply_backward', d, x.values.dtype)
    stretch = _stretches(n * g, length, tiling, x.values.device)
    dx = torch.empty_like(x.values)
    start(
        kernels.apply_backward_kernel, (n * g, stretch.count),
        (dy.values, x.values, _small(matrix), _small(slope), _small(offset), dx, g, length, stretch.length),
        (d, tiling.block, x.channels_last, slope.dim() == 4, _align(length), _precision(x)), tiling.num_warps,
    )  # fmt: skip
    return dx


def _small(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """Return a small matrix as the kernels read it."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _carved(like: Tensor, *shapes: tuple[int, ...]) -> list[Slice]:
    return carve(like.new_empty(room_for(*shapes)), *shapes)


def tiling_of(name: str, d: int, dtype: torch.dtype) -> Tiling:
    """Return how the kernel of a pass covers a map; half as much of a float32 one where shared memory would not do."""
    tiling = TILINGS[name][d]
    halved = d == 64 and dtype == torch.float32 and name.endswith('backward')
    return tiling._replace(block=tiling.block // 2) if halved else tiling


def _precision(x: StridedMap) -> str:
    return 'tf32x3' if x.values.dtype == torch.float32 else 'tf32'


def _align(length: int) -> int:
    """Return the power of two up to 16 that divides ``length``: it decides how wide the loads of a row can be."""
    return min(length & -length, 16)


@functools.lru_cache(maxsize=None)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


@functools.lru_cache(maxsize=4096)
def _stretches(rows: int, length: int, tiling: Tiling, device: torch.device) -> Stretches:
    """Share the positions out: enough programs to fill the device, no more than there are blocks."""
    blocks = triton.cdiv(length, tiling.block)
    wanted = triton.cdiv(tiling.programs * _multiprocessors(device), rows)
    per_program = triton.cdiv(blocks, min(wanted, blocks))
    return Stretches(per_program * tiling.block, triton.cdiv(blocks, per_program))
