"""The Triton kernels of the passes over a map; ``triton_maps`` says what each computes and starts them.

Axis 0 of the grid is a channel group of a sample, axis 1 a stretch of positions. A map's length L is units * align: so
the compiler knows what divides it, and loads 16 bytes at once where it can. Sums are float32. Products with M, K and S
are of x - p, where p is the mean of the first positions of the stretch: in TF32 a large mean of x would cost digits.
"""

import triton
import triton.language as tl

from . import maps
from .triton_coefficient_kernels import SCATTER_UNIT

ROOT_UNIT = tl.constexpr(maps.ROOT_UNIT)
PIVOT_POSITIONS = tl.constexpr(16)  # so many columns of a tile are read as fast as one


@triton.jit
def _offsets(positions, num_groups, length, d: tl.constexpr, channels_last: tl.constexpr):
    """Return where a map has the channels of this program's group at ``positions``, (d, block)."""
    group_index = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, d)
    if channels_last:
        corner = group_index // num_groups * length * num_groups * d + group_index % num_groups * d
        return corner + (positions[None, :] * (num_groups * d) + channels[:, None])
    else:
        return group_index * d * length + (channels[:, None] * length + positions[None, :])


@triton.jit
def _pivot(x, begin, end, num_groups, length, d: tl.constexpr, count: tl.constexpr, channels_last: tl.constexpr):
    """Return the mean of the first ``count`` positions of a stretch, (d,)."""
    positions = begin + tl.arange(0, count)
    offsets = _offsets(positions, num_groups, length, d, channels_last)
    first = tl.load(x + offsets, mask=(positions < end)[None, :], other=0.0)
    return tl.sum(first.to(tl.float32), 1) / tl.minimum(count, end - begin)


@triton.jit
def reduce_kernel(
    x, means, scatter, num_groups, units, stretch, with_covariance: tl.constexpr, d: tl.constexpr,
    block: tl.constexpr, channels_last: tl.constexpr, align: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    group_index, part = tl.program_id(0), tl.program_id(1)
    length = units * align
    begin = part * stretch
    end = tl.minimum(begin + stretch, length)
    pivot = _pivot(x, begin, end, num_groups, length, d, block, channels_last)
    sums = tl.zeros((d, block), tl.float32)
    products = tl.zeros((d, d if with_covariance else block), tl.float32)
    for start in range(begin, end, block):
        positions = start + tl.arange(0, block)
        there = (positions < end)[None, :]
        offsets = _offsets(positions, num_groups, length, d, channels_last)
        tile = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
        tile = tl.where(there, (tile - pivot[:, None]) / ROOT_UNIT, 0.0)
        sums += tile
        if with_covariance:
            products = tl.dot(tile, tl.trans(tile), products, input_precision=precision)
        else:
            products += tile * tile
    count = (end - begin).to(tl.float32)
    shift = tl.sum(sums, 1) / count
    channels = tl.arange(0, d)
    row = group_index * tl.num_programs(1) + part
    tl.store(means + row * d + channels, pivot + shift * ROOT_UNIT)
    if with_covariance:
        products -= count * shift[:, None] * shift[None, :]
        tl.store(scatter + row.to(tl.int64) * d * d + channels[:, None] * d + channels[None, :], products)
    else:
        tl.store(scatter + row * d + channels, tl.sum(products, 1) - count * shift * shift)


@triton.jit
def merge_moments_kernel(
    partial_means, partial_scatter, means, scatter, length, stretch, num_parts, with_covariance: tl.constexpr,
    d: tl.constexpr, rows: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """Merge the moments of the stretches: their scatters, and that of their means about the common mean."""
    group_index = tl.program_id(0)
    channels = tl.arange(0, d)
    row = tl.program_id(1) * rows + tl.arange(0, rows)
    first = group_index * num_parts
    mean = tl.zeros((d,), tl.float32)
    row_mean = tl.zeros((rows,), tl.float32)
    for start in range(0, num_parts, parts):
        part = start + tl.arange(0, parts)
        there = (part < num_parts)[:, None]
        share = tl.where(part < num_parts, tl.minimum(stretch, length - part * stretch), 0) / length
        pointers = partial_means + (first + part)[:, None] * d
        mean += tl.sum(tl.load(pointers + channels[None, :], mask=there, other=0.0) * share[:, None], 0)
        row_mean += tl.sum(tl.load(pointers + row[None, :], mask=there, other=0.0) * share[:, None], 0)
    total = tl.zeros((rows, d) if with_covariance else (rows,), tl.float32)
    for start in range(0, num_parts, parts):
        part = start + tl.arange(0, parts)
        there = (part < num_parts)[:, None]
        count = tl.where(part < num_parts, tl.minimum(stretch, length - part * stretch), 0) / SCATTER_UNIT
        pointers = partial_means + (first + part)[:, None] * d
        row_shift = tl.load(pointers + row[None, :], mask=there, other=0.0) - row_mean[None, :]
        rows_within = (first + part).to(tl.int64)[:, None] * d + row[None, :]
        if with_covariance:
            shift = tl.load(pointers + channels[None, :], mask=there, other=0.0) - mean[None, :]
            tile = partial_scatter + rows_within[:, :, None] * d + channels[None, None, :]
            within = tl.load(tile, mask=there[:, :, None], other=0.0)
            total += tl.sum(within + (count[:, None] * row_shift)[:, :, None] * shift[:, None, :], 0)
        else:
            within = tl.load(partial_scatter + rows_within, mask=there, other=0.0)
            total += tl.sum(within + count[:, None] * row_shift * row_shift, 0)
    if with_covariance:
        tl.store(scatter + (group_index.to(tl.int64) * d + row[:, None]) * d + channels[None, :], total)
    else:
        tl.store(scatter + group_index * d + row, total)
    tl.store(means + group_index * d + row, row_mean)


@triton.jit
def apply_kernel(
    x, matrix, constant, shortcut, out, num_groups, units, stretch, has_constant: tl.constexpr,
    has_shortcut: tl.constexpr, relu: tl.constexpr, d: tl.constexpr, block: tl.constexpr, channels_last: tl.constexpr,
    align: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    group_index, part = tl.program_id(0), tl.program_id(1)
    length = units * align
    begin = part * stretch
    end = tl.minimum(begin + stretch, length)
    channels = tl.arange(0, d)
    m = tl.load(matrix + (group_index * d + channels[:, None]) * d + channels[None, :])
    pivot = _pivot(x, begin, end, num_groups, length, d, PIVOT_POSITIONS, channels_last)
    c = tl.sum(m * pivot[None, :], 1)  # M x + c = M (x - p) + (M p + c)
    if has_constant:
        c += tl.load(constant + group_index * d + channels)
    for start in range(begin, end, block):
        positions = start + tl.arange(0, block)
        there = (positions < end)[None, :]
        offsets = _offsets(positions, num_groups, length, d, channels_last)
        tile = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32) - pivot[:, None]
        y = tl.dot(m, tile, input_precision=precision) + c[:, None]
        if has_shortcut:
            y += tl.load(shortcut + offsets, mask=there, other=0.0).to(tl.float32)
        if relu:
            y = tl.where(y < 0, 0.0, y)  # as torch, NaN stays NaN
        tl.store(out + offsets, y, mask=there)


@triton.jit
def reduce_backward_kernel(
    x, grad, relu_out, dy, products, sums, part_size, num_groups, units, stretch, relu: tl.constexpr, d: tl.constexpr,
    block: tl.constexpr, channels_last: tl.constexpr, align: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    group_index, part = tl.program_id(0), tl.program_id(1)
    length = units * align
    begin = part * stretch
    end = tl.minimum(begin + stretch, length)
    total = tl.zeros((d, d), tl.float32)
    total_dy = tl.zeros((d,), tl.float32)
    for start in range(begin, end, block):
        positions = start + tl.arange(0, block)
        there = (positions < end)[None, :]
        offsets = _offsets(positions, num_groups, length, d, channels_last)
        tile = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
        dy_tile = tl.load(grad + offsets, mask=there, other=0.0)
        if relu:
            stopped = tl.load(relu_out + offsets, mask=there, other=0.0) <= 0
            dy_tile = tl.where(stopped, 0.0, dy_tile).to(dy.dtype.element_ty)
            tl.store(dy + offsets, dy_tile, mask=there)
        dy_tile = dy_tile.to(tl.float32)
        total_dy += tl.sum(dy_tile, 1)
        total = tl.dot(dy_tile, tl.trans(tile), total, input_precision=precision)
    channels = tl.arange(0, d)
    start_of_part = part.to(tl.int64) * part_size
    tl.store(products + start_of_part + (group_index * d + channels[:, None]) * d + channels[None, :], total)
    tl.store(sums + start_of_part + group_index * d + channels, total_dy)


@triton.jit
def apply_backward_kernel(
    dy, x, matrix, k_matrix, k_vector, dx, num_groups, units, stretch, full: tl.constexpr, d: tl.constexpr,
    block: tl.constexpr, channels_last: tl.constexpr, align: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    group_index, part = tl.program_id(0), tl.program_id(1)
    length = units * align
    begin = part * stretch
    end = tl.minimum(begin + stretch, length)
    channels = tl.arange(0, d)
    transposed = (group_index * d + channels[None, :]) * d + channels[:, None]
    m_transposed = tl.load(matrix + transposed)
    k = tl.load(k_vector + group_index * d + channels)
    if full:
        k_tile = tl.load(k_matrix + transposed)  # K is symmetric
        pivot = _pivot(x, begin, end, num_groups, length, d, PIVOT_POSITIONS, channels_last)
        k -= tl.sum(k_tile * pivot[None, :], 1)  # K x - k = K (x - p) - (k - K p)
    else:
        k_tile = tl.load(k_matrix + group_index * d + channels)[:, None]
    for start in range(begin, end, block):
        positions = start + tl.arange(0, block)
        there = (positions < end)[None, :]
        offsets = _offsets(positions, num_groups, length, d, channels_last)
        tile = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
        dy_tile = tl.load(dy + offsets, mask=there, other=0.0).to(tl.float32)
        total = tl.dot(m_transposed, dy_tile, input_precision=precision)
        if full:
            total = tl.dot(k_tile, tile - pivot[:, None], total, input_precision=precision)
        else:
            total += k_tile * tile
        tl.store(dx + offsets, total - k[:, None], mask=there)
