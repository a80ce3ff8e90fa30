"""The Triton kernels of the passes over a map; ``triton_maps`` says what each computes and starts them.

Program 0 of an axis is a channel group of a sample, program 1 a stretch of positions. Sums are float32.
"""

import triton
import triton.language as tl

from . import maps

SCATTER_UNIT = tl.constexpr(maps.SCATTER_UNIT)
ROOT_UNIT = tl.constexpr(maps.ROOT_UNIT)


@triton.jit
def _tile(pointer, positions, num_groups, length, d: tl.constexpr, channels_last: tl.constexpr, align: tl.constexpr):
    """Return pointers to the channels of this program's group at ``positions``, (d, block)."""
    group_index = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, d)
    if channels_last:
        corner = pointer + group_index // num_groups * length * num_groups * d + group_index % num_groups * d
        return corner + positions[None, :] * (num_groups * d) + channels[:, None]
    else:
        if align > 1:  # a length of 1 is a constant to Triton, which takes no hint
            length = tl.multiple_of(length, align)
        return pointer + group_index * d * length + channels[:, None] * length + positions[None, :]


@triton.jit
def _load(
    pointer, positions, end, num_groups, length, d: tl.constexpr, channels_last: tl.constexpr, align: tl.constexpr
):
    """Load the tile at ``positions`` below ``end``, (d, block), zero beyond, in its own dtype."""
    pointers = _tile(pointer, positions, num_groups, length, d, channels_last, align)
    return tl.load(pointers, mask=(positions < end)[None, :], other=0.0)


@triton.jit
def _store(
    pointer, tile, positions, end, num_groups, length, d: tl.constexpr, channels_last: tl.constexpr, align: tl.constexpr
):
    pointers = _tile(pointer, positions, num_groups, length, d, channels_last, align)
    tl.store(pointers, tile, mask=(positions < end)[None, :])


@triton.jit
def reduce_kernel(
    x,
    means,
    scatter,
    num_groups,
    length,
    stretch,
    d: tl.constexpr,
    block: tl.constexpr,
    channels_last: tl.constexpr,
    with_covariance: tl.constexpr,
    align: tl.constexpr,
    precision: tl.constexpr,
):
    group_index, part = tl.program_id(0), tl.program_id(1)
    begin = part * stretch
    end = tl.minimum(begin + stretch, length)
    # About the mean of the first block: sums of squares about zero would cost digits where the mean is large
    positions = begin + tl.arange(0, block)
    first = _load(x, positions, end, num_groups, length, d, channels_last, align).to(tl.float32)
    pivot = tl.sum(first, 1) / tl.minimum(block, end - begin)
    sums = tl.zeros((d, block), tl.float32)
    if with_covariance:
        products = tl.zeros((d, d), tl.float32)
    else:
        products = tl.zeros((d, block), tl.float32)
    for start in range(begin, end, block):
        positions = start + tl.arange(0, block)
        tile = _load(x, positions, end, num_groups, length, d, channels_last, align).to(tl.float32)
        tile = tl.where((positions < end)[None, :], (tile - pivot[:, None]) / ROOT_UNIT, 0.0)
        sums += tile
        if with_covariance:
            products = tl.dot(tile, tl.trans(tile), products, input_precision=precision)
        else:
            products += tile * tile
    count = (end - begin).to(tl.float32)
    shift = tl.sum(sums, 1) / count
    channels = tl.arange(0, d)
    out = group_index * tl.num_programs(1) + part
    tl.store(means + out * d + channels, pivot + shift * ROOT_UNIT)
    if with_covariance:
        products -= count * shift[:, None] * shift[None, :]
        tl.store(scatter + out.to(tl.int64) * d * d + channels[:, None] * d + channels[None, :], products)
    else:
        tl.store(scatter + out * d + channels, tl.sum(products, 1) - count * shift * shift)


@triton.jit
def merge_moments_kernel(
    partial_means,
    partial_scatter,
    means,
    scatter,
    length,
    stretch,
    num_parts,
    d: tl.constexpr,
    rows: tl.constexpr,
    parts: tl.constexpr,
    with_covariance: tl.constexpr,
):
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
    if with_covariance:
        total = tl.zeros((rows, d), tl.float32)
    else:
        total = tl.zeros((d,), tl.float32)
    for start in range(0, num_parts, parts):
        part = start + tl.arange(0, parts)
        there = (part < num_parts)[:, None]
        count = tl.where(part < num_parts, tl.minimum(stretch, length - part * stretch), 0) / SCATTER_UNIT
        pointers = partial_means + (first + part)[:, None] * d
        shift = tl.load(pointers + channels[None, :], mask=there, other=0.0) - mean[None, :]
        if with_covariance:
            row_shift = count[:, None] * (tl.load(pointers + row[None, :], mask=there, other=0.0) - row_mean[None, :])
            tile = (first + part).to(tl.int64)[:, None, None] * d * d + row[None, :, None] * d + channels[None, None, :]
            within = tl.load(partial_scatter + tile, mask=there[:, :, None], other=0.0)
            total += tl.sum(within + row_shift[:, :, None] * shift[:, None, :], 0)
        else:
            tile = (first + part)[:, None] * d + channels[None, :]
            within = tl.load(partial_scatter + tile, mask=there, other=0.0)
            total += tl.sum(within + count[:, None] * shift * shift, 0)
    if with_covariance:
        tl.store(scatter + group_index.to(tl.int64) * d * d + row[:, None] * d + channels[None, :], total)
    else:
        tl.store(scatter + group_index * d + channels, total)
    tl.store(means + group_index * d + channels, mean)


@triton.jit
def apply_kernel(
    x,
    matrix,
    constant,
    residual,
    out,
    num_groups,
    length,
    stretch,
    d: tl.constexpr,
    block: tl.constexpr,
    channels_last: tl.constexpr,
    has_constant: tl.constexpr,
    has_residual: tl.constexpr,
    relu: tl.constexpr,
    align: tl.constexpr,
    precision: tl.constexpr,
):
    group_index, part = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, d)
    m = tl.load(matrix + group_index * d * d + channels[:, None] * d + channels[None, :])
    if has_constant:
        c = tl.load(constant + group_index * d + channels)[:, None]
    begin = part * stretch
    end = tl.minimum(begin + stretch, length)
    for start in range(begin, end, block):
        positions = start + tl.arange(0, block)
        y = tl.dot(
            m,
            _load(x, positions, end, num_groups, length, d, channels_last, align).to(tl.float32),
            input_precision=precision,
        )
        if has_constant:
            y += c
        if has_residual:
            y += _load(residual, positions, end, num_groups, length, d, channels_last, align).to(tl.float32)
        if relu:
            y = tl.where(y < 0, 0.0, y)  # as torch, NaN stays NaN
        _store(out, y, positions, end, num_groups, length, d, channels_last, align)


@triton.jit
def reduce_backward_kernel(
    x,
    grad,
    relu_out,
    dy,
    products,
    sums,
    num_groups,
    length,
    stretch,
    d: tl.constexpr,
    block: tl.constexpr,
    channels_last: tl.constexpr,
    relu: tl.constexpr,
    align: tl.constexpr,
    precision: tl.constexpr,
):
    group_index, part = tl.program_id(0), tl.program_id(1)
    begin = part * stretch
    end = tl.minimum(begin + stretch, length)
    total = tl.zeros((d, d), tl.float32)
    total_dy = tl.zeros((d,), tl.float32)
    for start in range(begin, end, block):
        positions = start + tl.arange(0, block)
        tile = _load(x, positions, end, num_groups, length, d, channels_last, align).to(tl.float32)
        dy_tile = _load(grad, positions, end, num_groups, length, d, channels_last, align)
        if relu:
            passed = _load(relu_out, positions, end, num_groups, length, d, channels_last, align) <= 0
            dy_tile = tl.where(passed, 0.0, dy_tile).to(dy.dtype.element_ty)
            _store(dy, dy_tile, positions, end, num_groups, length, d, channels_last, align)
        dy_tile = dy_tile.to(tl.float32)
        total_dy += tl.sum(dy_tile, 1)
        total = tl.dot(dy_tile, tl.trans(tile), total, input_precision=precision)
    channels = tl.arange(0, d)
    index = group_index * tl.num_programs(1) + part
    tl.store(products + index.to(tl.int64) * d * d + channels[:, None] * d + channels[None, :], total)
    tl.store(sums + index * d + channels, total_dy)


@triton.jit
def merge_sums_kernel(
    partial_products, partial_sums, products, sums, num_parts, d: tl.constexpr, rows: tl.constexpr, parts: tl.constexpr
):
    group_index = tl.program_id(0)
    channels = tl.arange(0, d)
    row = tl.program_id(1) * rows + tl.arange(0, rows)
    first = group_index * num_parts
    total = tl.zeros((rows, d), tl.float32)
    row_sums = tl.zeros((rows,), tl.float32)
    for start in range(0, num_parts, parts):
        part = start + tl.arange(0, parts)
        there = (part < num_parts)[:, None]
        tile = (first + part).to(tl.int64)[:, None, None] * d * d + row[None, :, None] * d + channels[None, None, :]
        total += tl.sum(tl.load(partial_products + tile, mask=there[:, :, None], other=0.0), 0)
        tile = (first + part)[:, None] * d + row[None, :]
        row_sums += tl.sum(tl.load(partial_sums + tile, mask=there, other=0.0), 0)
    tl.store(products + group_index.to(tl.int64) * d * d + row[:, None] * d + channels[None, :], total)
    tl.store(sums + group_index * d + row, row_sums)


@triton.jit
def apply_backward_kernel(
    dy,
    x,
    matrix,
    slope,
    offset,
    dx,
    num_groups,
    length,
    stretch,
    d: tl.constexpr,
    block: tl.constexpr,
    channels_last: tl.constexpr,
    full: tl.constexpr,
    align: tl.constexpr,
    precision: tl.constexpr,
):
    group_index, part = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, d)
    tile = group_index * d * d + channels[None, :] * d + channels[:, None]
    m_transposed = tl.load(matrix + tile)
    if full:
        slopes = tl.load(slope + tile)
    else:
        slopes = tl.load(slope + group_index * d + channels)[:, None]
    offsets = tl.load(offset + group_index * d + channels)[:, None]
    begin = part * stretch
    end = tl.minimum(begin + stretch, length)
    for start in range(begin, end, block):
        positions = start + tl.arange(0, block)
        x_tile = _load(x, positions, end, num_groups, length, d, channels_last, align).to(tl.float32)
        total = tl.dot(
            m_transposed,
            _load(dy, positions, end, num_groups, length, d, channels_last, align).to(tl.float32),
            input_precision=precision,
        )
        if full:
            total = tl.dot(slopes, x_tile, total, input_precision=precision)
        else:
            total += slopes * x_tile
        _store(dx, total - offsets, positions, end, num_groups, length, d, channels_last, align)
