"""The passes over a map, and the only place that knows how a map lies in memory.

The map h, (N, C, H, W), is contiguous or channels_last. ``group`` prepares it as N B matrices of J channels and L = H W
positions: its B channel groups, or all channels as one block where a 1x1 convolution is passed through. Four passes
then read or write it:

    moments           m, S / (L - 1), S = (h - m)(h - m)^T                  one reduction, by sample and block
    apply             y = relu(F h + c + shortcut)                          one product
    reduce_backward   dF = dy h^T, dc = sum(dy)                             one reduction
    apply_backward    dh = F^T dy + K (h - m) + k                           two products; one where K is diagonal

A 16-bit map on CUDA is read as h - m, with m subtracted in float32, and so is y = F (h - m) + (c + F m): no large
numbers cancel after they were rounded to 16 bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import compat
from . import precision
from .records import Moments

# A GPU multiplies each small matrix in one thread block, so a few long ones are cut into about so many parts. By the
# model of docs/benchmarks.md; not run on a GPU.
PARTS = 32


def is_channels_last(x: Tensor) -> bool:
    """Return whether a map is channels_last; one that is neither that nor contiguous is copied to contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class GroupedMap(NamedTuple):
    """A map as N B matrices."""

    values: Tensor  # (N B, J, L), h or h - m; a view of the map where it can be
    means: Tensor  # m, (N, B, J)
    is_centered: bool  # whether the values are h - m
    channels_last: bool  # then the values are the transpose of a contiguous (N B, L, J)
    scratch: Optional[Tensor]  # of the shape of the values: h - m, and afterwards y

    @property
    def mean_columns(self) -> Tensor:
        """The means beside the values, (N B, J, 1)."""
        return self.means.flatten(0, 1)[..., None]


def matrices(x: Tensor, block_size: int, channels_last: bool) -> Tensor:
    """Return a map, (N, C, H, W), as (N B, J, L) matrices; where it is channels_last, as their transposes."""
    n, channels, height, width = x.shape
    num_blocks = channels // block_size
    length = height * width
    if not channels_last:
        return x.reshape(n * num_blocks, block_size, length)
    by_position = x.permute(0, 2, 3, 1).reshape(n, length, num_blocks, block_size)
    return by_position.transpose(1, 2).reshape(n * num_blocks, length, block_size).mT


def as_map(values: Tensor, like: Tensor, num_blocks: int, channels_last: bool) -> Tensor:
    """Return (N B, R, L) matrices as a map with the samples, size and dtype of ``like``."""
    n, _, height, width = like.shape
    block_size, length = values.shape[1:]
    channels = num_blocks * block_size
    values = values.to(like.dtype)
    if not channels_last:
        return values.view(n, channels, height, width)
    by_position = values.mT.reshape(n, num_blocks, length, block_size).transpose(1, 2)
    return by_position.reshape(n, height, width, channels).permute(0, 3, 1, 2)


def group(
    x: Tensor,
    block_size: int,
    dtype: torch.dtype,
    channels_last: bool,
    means: Optional[Tensor] = None,
    with_scratch: bool = False,
) -> GroupedMap:
    """Prepare a map, (N, C, H, W), for the passes, in blocks of J channels.

    Args:
        x: If it is neither contiguous nor channels_last it is copied to the contiguous format.
        block_size: Channels J of a block.
        dtype: The dtype to compute in. A 16-bit map on CUDA stays in 16 bits.
        channels_last: Which format to bring it into.
        means: The means m of each sample's positions, (N, B, J), if they are known.
        with_scratch: Whether ``moments`` and ``apply`` share one buffer of the size of the map.
    """
    is_centered = dtype == torch.float32 and precision.stays_16_bit(x)
    values = matrices(x if is_centered else x.to(dtype), block_size, channels_last)
    if means is None:
        means = values.mean(2, dtype=dtype).view(x.shape[0], x.shape[1] // block_size, block_size)
    if is_centered:
        values = _add(values, means.flatten(0, 1)[..., None], channels_last, values.dtype, sign=-1)
    # torch.compile takes no buffer that is transposed
    has_scratch = with_scratch and not (channels_last or is_centered)
    return GroupedMap(
        values=values,
        means=means,
        is_centered=is_centered,
        channels_last=channels_last,
        scratch=torch.empty_like(values) if has_scratch else None,
    )


def moments(h: GroupedMap, with_covariance: bool) -> Moments:
    """Return the means of each sample's positions, and the covariances about them or their diagonals.

    Sums about zero would lose the variance of a channel whose mean is many deviations.
    """
    length = h.values.shape[2]
    factor = 1 / (length - 1 + 1 // length)  # 1 for a 1x1 map, whose variance is 0; max() would choose in a trace
    centered = h.values if h.is_centered else torch.sub(h.values, h.mean_columns, out=h.scratch)
    if with_covariance:
        covariances = _covariances(centered, h.mean_columns, factor)
    elif h.channels_last:  # torch is slow at a norm over positions that are not side by side
        covariances = centered.square().sum(2, dtype=h.means.dtype) * factor
    else:
        covariances = torch.linalg.vector_norm(centered, dim=2, dtype=h.means.dtype).square() * factor
    return Moments(h.means, covariances.view(*h.means.shape, *covariances.shape[2:]))


def apply(h: GroupedMap, x: Tensor, matrix: Tensor, shortcut: Optional[Tensor] = None, relu: bool = False) -> Tensor:
    """Return relu(F h + c + shortcut), in the dtype and memory format of the map ``x`` that h was made of.

    ``matrix`` is [F | c], (N B, R, J + 1), with R rows for each block of h. The shortcut, of the shape of the result,
    may be None.
    """
    factor = matrix[..., :-1]
    added = matrix[..., -1:]
    out = h.scratch if h.values.shape[1] == factor.shape[1] else None
    if h.is_centered:
        added = torch.baddbmm(added, factor, h.mean_columns)
    factor = factor.to(h.values.dtype)
    if shortcut is None:
        added = added.to(h.values.dtype)
    else:
        shortcut = matrices(shortcut, factor.shape[1], h.channels_last)
        added = _add(shortcut, added, h.channels_last, h.values.dtype, out)
        out = added
    values = _multiply(factor, h.values, h.channels_last, added, out)
    result = as_map(values, x, h.means.shape[1], h.channels_last)
    return result.relu_() if relu else result


def reduce_backward(
    grad: Tensor, h: GroupedMap, num_rows: int, out: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [dF | dc], (N B, R, J + 1), dF = dy h^T and dc = sum(dy), then dy as a map and as matrices, (N B, R, L).

    ``grad`` is the gradient of what ``apply`` returned; dy is that before the ReLU, whose output ``out`` was, and so of
    the shortcut. ``num_rows`` is R.
    """
    dy_map = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
    dy = matrices(dy_map.to(h.values.dtype), num_rows, h.channels_last)
    d_constant = dy.sum(2, keepdim=True, dtype=h.means.dtype)
    d_factor = _sums_of_products(dy, h.values).to(h.means.dtype)
    if h.is_centered:
        d_factor = torch.baddbmm(d_factor, d_constant, h.mean_columns.mT)
    return torch.cat([d_factor, d_constant], 2), dy_map, dy


def apply_backward(
    dy: Tensor, h: GroupedMap, x: Tensor, matrix: Tensor, k_matrix: Tensor, k_vector: Optional[Tensor]
) -> Tensor:
    """Return dh = F^T dy + K (h - m) + k, in the shape, dtype and memory format of the map ``x``.

    K is (N B, J, J), symmetric, or where it is diagonal its diagonal, (N B, J). k is (N B, J), or None for 0.
    """
    added = None if k_vector is None else k_vector[..., None]
    factor = matrix[..., :-1].to(h.values.dtype).mT
    is_diagonal = k_matrix.dim() == 2
    k_matrix = k_matrix[..., None] if is_diagonal else k_matrix
    if not h.is_centered:
        means = h.mean_columns
        if is_diagonal:
            added = -k_matrix * means if added is None else torch.addcmul(added, k_matrix, means, value=-1)
        elif added is None:
            added = torch.baddbmm(means, k_matrix, means, beta=0, alpha=-1)
        else:
            added = torch.baddbmm(added, k_matrix, means, alpha=-1)
    k_matrix = k_matrix.to(h.values.dtype)
    added = None if added is None else added.to(h.values.dtype)
    if not is_diagonal:
        dh = _multiply(k_matrix, h.values, h.channels_last, added)
    elif added is None:
        dh = k_matrix * h.values
    else:
        dh = torch.addcmul(added, k_matrix, h.values)
    return as_map(_multiply(factor, dy, h.channels_last, dh, dh), x, h.means.shape[1], h.channels_last)


def _add(
    values: Tensor,
    constants: Tensor,
    channels_last: bool,
    dtype: torch.dtype,
    out: Optional[Tensor] = None,
    sign: int = 1,
) -> Tensor:
    """Return values +- constants, (N B, R, L), in a dtype, to which the sum is rounded within the operation."""
    if channels_last:  # torch.compile takes no result that is transposed
        return _add(values.mT, constants.mT, False, dtype, sign=sign).mT
    out = values.new_empty(values.shape, dtype=dtype) if out is None else out
    return torch.add(values, constants, alpha=sign, out=out)


def _multiply(
    factor: Tensor, values: Tensor, channels_last: bool, added: Optional[Tensor], out: Optional[Tensor] = None
) -> Tensor:
    """Return added + factor values, (N B, R, L), in ``out`` if there is one.

    Of a channels_last map the transpose is contiguous: torch would multiply block by block into strides, which takes
    longer than a copy of the product does.
    """
    left, right = (values.mT, factor.mT) if channels_last else (factor, values)
    if channels_last:
        added = None if added is None else added.mT
        out = None if out is None else out.mT
    product = torch.bmm(left, right) if added is None else torch.baddbmm(added, left, right, out=out)
    return product.mT if channels_last else product


def _covariances(centered: Tensor, means: Tensor, factor: float) -> Tensor:
    """Return centered centered^T times a factor, (N B, J, J), in float32 at least."""
    if centered.element_size() > 2:
        # With beta = 0 it does not matter what is added, and the factor costs no operation
        return torch.baddbmm(means, centered, centered.mT, beta=0, alpha=factor)
    # Cut along the positions into equal parts; torch.compile takes no gcd of a size that changes
    most = PARTS // max(len(centered), 1)
    num_parts = 1 if compat.is_compiling() else math.gcd(centered.shape[2], max(most, 1))
    parts = centered.unflatten(2, (num_parts, -1)).transpose(1, 2).flatten(0, 1)
    if _sums_in_float32(centered):
        products = torch.bmm(parts, parts.mT, out_dtype=torch.float32)
    else:
        parts = parts.float()
        products = torch.bmm(parts, parts.mT)
    return products.unflatten(0, (-1, num_parts)).sum(1) * factor


def _sums_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T, in float32 at least; an older torch rounds to 16 bits, as the gradient of a convolution."""
    if left.element_size() == 2 and _sums_in_float32(left):
        return torch.bmm(left, right.mT, out_dtype=torch.float32)
    return torch.bmm(left, right.mT)


def _sums_in_float32(x: Tensor) -> bool:
    """Return whether torch multiplies 16-bit matrices like ``x`` into float32 ones: on CUDA since torch 2.8."""
    return x.is_cuda and compat.TORCH >= (2, 8)
