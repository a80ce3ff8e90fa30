"""The passes over a map, and the only place that knows how a map lies in memory.

A map is (N, C, H, W), contiguous or channels_last. ``group`` prepares it, as N G matrices of d channels and L = H W
positions; four passes then read or write it:

    reduce            m = mean(x), S = (x - m)(x - m)^T                    one reduction, by sample and group
    apply             y = relu(M x + c + shortcut)                         one product
    reduce_backward   dM = dy x^T, dc = sum(dy)                            one reduction
    apply_backward    dx = M^T dy + K x - k                                two products; one where K is diagonal

``triton_maps`` has the same functions for GPUs. Here, of channels_last maps the transposes, (N G, L, d), are
contiguous: the channels of a group stay side by side.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor

# S is handed on in this unit, a power of two, which costs no digits: the sum of a map's squares leaves float32's range
# before their mean does. Up to 2**20 positions it does not exceed the largest square.
SCATTER_UNIT = 2.0**20
ROOT_UNIT = 2.0**10


class GroupedMap(NamedTuple):
    """A map as N G matrices."""

    values: Tensor  # (N G, d, L), a view of the map where it can be one
    map: Tensor  # (N, C, H, W)
    channels_last: bool
    scratch: Optional[Tensor]  # of the shape of ``values``: x - m, and where the product goes afterwards


def group(
    x: Tensor, group_size: int, dtype: torch.dtype, channels_last: Optional[bool] = None, with_scratch: bool = False
) -> GroupedMap:
    """Prepare a map for the passes.

    Args:
        x: (N, C, H, W). If it is neither contiguous nor channels_last it is copied to the contiguous format.
        group_size: Channels d of a group.
        dtype: The dtype to compute in. A 16-bit map on CUDA stays as it is where torch can sum its products in float32.
        channels_last: Which format to bring it into; None for its own.
        with_scratch: Whether ``reduce`` and ``apply`` follow, which share one buffer of the size of the map.
    """
    channels_last = _is_channels_last(x) if channels_last is None else channels_last
    if not (x.is_cuda and x.element_size() == 2 and dtype == torch.float32 and _bmm_sums_in_float32()):
        converted = x.to(dtype)
    else:
        converted = x
    if channels_last:
        converted = converted.contiguous(memory_format=torch.channels_last)
        values = _by_groups(converted, group_size).mT.flatten(0, 1).contiguous().mT
    else:
        values = converted.reshape(-1, group_size, x.shape[2] * x.shape[3])
    # torch.compile takes no buffer that is transposed, and a 16-bit one would round x - m
    scratch = torch.empty_like(values) if with_scratch and not channels_last and values.dtype == dtype else None
    return GroupedMap(values, x, channels_last, scratch)


def reduce(x: GroupedMap, with_covariance: bool) -> tuple[Tensor, Tensor]:
    """Return the means m of each sample's positions and the products summed about them.

    About zero instead of m, a mean of many standard deviations would cost float32 the digits of the variance. 16-bit
    maps are not harmed: their own rounding is larger than what the float32 sums lose.

    Their sums could overflow, though: of bfloat16 maps on CUDA from magnitudes of 1e16 on.

    Returns:
        m, (N, G, d), and the scatter S = (x - m)(x - m)^T, (N, G, d, d), or without covariance its diagonal, (N, G, d),
        divided by ``SCATTER_UNIT``.
    """
    values, num_samples = x.values, x.map.shape[0]
    if values.element_size() == 2:
        means = values.mean(2, dtype=torch.float32)
        if with_covariance:
            scatter = torch.bmm(values, values.mT, out_dtype=torch.float32)
            one, all_positions = 1 / SCATTER_UNIT, values.shape[2] / SCATTER_UNIT
            scatter = torch.baddbmm(scatter, means[:, :, None], means[:, None], beta=one, alpha=-all_positions)
        else:
            root = torch.linalg.vector_norm(values, dim=2, dtype=torch.float32) / ROOT_UNIT
            scatter = torch.addcmul(root.square(), means, means, value=-values.shape[2] / SCATTER_UNIT).clamp_(min=0)
    else:
        means = values.mean(2)
        centered = torch.add(means[..., None] / -ROOT_UNIT, values, alpha=1 / ROOT_UNIT, out=x.scratch)
        if with_covariance:
            scatter = torch.bmm(centered, centered.mT)
        elif x.channels_last:  # torch is slow at a norm over positions that are not side by side
            scatter = centered.square_().sum(2)
        else:
            scatter = torch.linalg.vector_norm(centered, dim=2).square()
    return means.unflatten(0, (num_samples, -1)), scatter.unflatten(0, (num_samples, -1))


def apply(
    x: GroupedMap, matrix: Tensor, constant: Optional[Tensor], residual: Optional[Tensor] = None, relu: bool = False
) -> Tensor:
    """Return relu(M x + c + residual), of the shape, dtype and memory format of the map.

    Args:
        x: The map.
        matrix: M, (N, G, d, d).
        constant: c, (N, G, d), or None.
        residual: The shortcut, of the shape of the map, or None.
        relu: Whether ReLU comes last.
    """
    out = _as_map(_multiply(matrix, x, constant, x.scratch), x)
    if residual is not None:
        out += residual
    return out.relu_() if relu else out


def reduce_backward(
    grad: Tensor, x: GroupedMap, out: Optional[Tensor] = None, with_constant: bool = True
) -> tuple[Tensor, Optional[Tensor], Tensor, GroupedMap]:
    """Return the gradients of M and of its constant, and that of the shortcut.

    Args:
        grad: The gradient of the output of ``apply``, (N, C, H, W).
        x: The map that M was applied to.
        out: The output of the ReLU at the end, or None where there was none.
        with_constant: Whether there was a constant.

    Returns:
        dM = dy x^T, (N, G, d, d); dc = sum(dy), (N, G, d), or None; dy, the gradient before the ReLU, (N, C, H, W); and
        dy prepared for ``apply_backward``.
    """
    dy_map = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
    dy = group(dy_map, x.values.shape[1], x.values.dtype, x.channels_last)
    shape = x.map.shape[0], -1
    d_matrix = _sum_of_products(dy.values, x.values).unflatten(0, shape)
    d_constant = dy.values.sum(2, dtype=d_matrix.dtype).unflatten(0, shape) if with_constant else None
    return d_matrix, d_constant, dy_map, dy


def apply_backward(dy: GroupedMap, x: GroupedMap, matrix: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return dx = M^T dy + K x - k, of the shape, dtype and memory format of the map.

    Args:
        dy: The gradient before the ReLU.
        x: The map that M was applied to.
        matrix: M, (N, G, d, d).
        slope: K, (N, G, d, d), symmetric, or where it is diagonal its diagonal, (N, G, d).
        offset: k, (N, G, d).
    """
    dx = _multiply(matrix.mT, dy, offset, sign=-1)
    if slope.dim() == 3:
        dx.addcmul_(slope.flatten(0, 1)[..., None].to(dx.dtype), x.values)
    elif x.channels_last:
        dx.mT.baddbmm_(x.values.mT, slope.flatten(0, 1).to(dx.dtype))
    else:
        dx.baddbmm_(slope.flatten(0, 1).to(dx.dtype), x.values)
    return _as_map(dx, x)


def _multiply(
    matrix: Tensor, x: GroupedMap, constant: Optional[Tensor], out: Optional[Tensor] = None, sign: int = 1
) -> Tensor:
    """Return M x + sign c, (N G, d, L), in ``out`` if given; of a channels_last map the transpose is contiguous."""
    left, right = matrix.flatten(0, 1).to(x.values.dtype), x.values
    if constant is not None:
        constant = constant.flatten(0, 1)[..., None].to(right.dtype)
    if x.channels_last:
        left, right, constant = right.mT, left.mT, None if constant is None else constant.mT
    if constant is None or right.is_cuda:  # baddbmm would write the constant out in full first
        product = torch.bmm(left, right, out=out)
        if constant is not None:
            product.add_(constant, alpha=sign)
    else:
        product = torch.baddbmm(constant, left, right, beta=sign, out=out)
    return product.mT if x.channels_last else product


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T, summed over positions in float32 at least."""
    if left.element_size() == 2:
        return torch.bmm(left, right.mT, out_dtype=torch.float32)
    return torch.bmm(left, right.mT)


@functools.lru_cache(maxsize=None)
def _bmm_sums_in_float32() -> bool:
    """Return whether torch multiplies 16-bit matrices into float32 ones on CUDA."""
    matrix = torch.ones(1, 8, 8, dtype=torch.bfloat16, device='cuda')
    try:
        return torch.bmm(matrix, matrix, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):
        return False


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _by_groups(x: Tensor, group_size: int) -> Tensor:
    """View (N, C, H, W), contiguous or channels_last, as (N, G, d, L)."""
    return x.flatten(2).unflatten(1, (-1, group_size))


def _as_map(values: Tensor, like: GroupedMap) -> Tensor:
    """Return (N G, d, L) in the shape, dtype and memory format of a map."""
    if not like.channels_last:
        return values.view(like.map.shape).to(like.map.dtype)
    out = torch.empty_like(like.map)
    _by_groups(out, values.shape[1]).copy_(values.unflatten(0, (like.map.shape[0], -1)))
    return out
