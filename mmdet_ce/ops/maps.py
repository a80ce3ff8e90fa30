"""The passes over a map, and the only place that knows how a map lies in memory.

A map is (N, C, H, W), contiguous or channels_last. ``group`` prepares it, as N G matrices of d channels and L = H W
positions; four passes then read or write it:

    reduce            m = mean(x), S = (x - m)(x - m)^T                    one reduction, by sample and group
    apply             y = relu(M x + c + shortcut)                         one product
    reduce_backward   dM = dy x^T, dc = sum(dy)                            one reduction
    apply_backward    dx = M^T dy + K x - k                                two products; one where K is diagonal

``triton_maps`` has the same functions for GPUs. Here, the passes are products of one batch of N G matrices. The groups
of a channels_last map are copied for it, (N G, L, d), and the product is copied back.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import compat
from . import precision

# S is kept in units of 2**20, since the plain sum of squares can overflow float32. A power of two costs no precision.
SCATTER_UNIT = 2.0**20
ROOT_UNIT = 2.0**10


def is_channels_last(x: Tensor) -> bool:
    """Return whether a map is channels_last; one that is neither that nor contiguous is copied to contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class GroupedMap(NamedTuple):
    """A map as N G matrices."""

    values: Tensor  # (N G, d, L); a view of the map where it can be
    map: Tensor  # (N, C, H, W)
    channels_last: bool  # then the values are the transpose of a contiguous (N G, L, d)
    scratch: Optional[Tensor]  # of the shape of the values: x - m, and where the product goes afterwards


def group(
    x: Tensor, group_size: int, dtype: torch.dtype, channels_last: Optional[bool] = None, with_scratch: bool = False
) -> GroupedMap:
    """Prepare a map, (N, C, H, W), for the passes, in groups of d channels.

    Args:
        x: If it is neither contiguous nor channels_last it is copied to the contiguous format.
        group_size: Channels d of a group.
        dtype: The dtype to compute in. A 16-bit map on CUDA stays as it is.
        channels_last: Which format to bring it into; None for its own.
        with_scratch: Whether ``reduce`` and ``apply`` follow, which share one buffer of the size of the map.
    """
    (n, _, h, w), d = x.shape, group_size
    if channels_last is None:
        channels_last = is_channels_last(x)
    converted = x if dtype == torch.float32 and precision.stays_16_bit(x) else x.to(dtype)
    if channels_last:
        by_position = converted.permute(0, 2, 3, 1).reshape(n, h * w, -1, d)
        values = by_position.transpose(1, 2).reshape(-1, h * w, d).mT
    else:
        values = converted.reshape(-1, d, h * w)
    # torch.compile takes no buffer that is transposed, and a 16-bit one would round x - m
    has_scratch = with_scratch and not channels_last and values.dtype == dtype
    return GroupedMap(values, x, channels_last, torch.empty_like(values) if has_scratch else None)


def reduce(x: GroupedMap, with_covariance: bool) -> tuple[Tensor, Tensor]:
    """Return the means m of each sample's positions and the products summed about them.

    They are m, (N, G, d), and the scatter S = (x - m)(x - m)^T, (N, G, d, d), or without covariance its diagonal, in
    units of ``SCATTER_UNIT``. Sums about zero instead of m would lose the variance of a channel whose mean is many
    deviations. They are good enough for 16-bit maps, whose own rounding is larger. (bfloat16 maps on CUDA can overflow
    from magnitudes of 1e16 on.)
    """
    values, length = x.values, x.values.shape[2]
    if values.element_size() == 2 and not with_covariance and _reads_once(values):
        moments = torch.batch_norm_update_stats(values.reshape(1, -1, length), None, None, 0)
        means, variance = (t.view(values.shape[:2]) for t in moments)
        scatter = variance * (length / SCATTER_UNIT)
    elif values.element_size() == 2:
        means = values.mean(2, dtype=torch.float32)
        if with_covariance:
            # the means will be subtracted: an older torch, which would round the sums, is given float32
            exact = values if _bmm_sums_in_float32(values.device, values.dtype) else values.float()
            squares, left, right = _sum_of_products(exact, exact) / SCATTER_UNIT, means[:, :, None], means[:, None]
        else:
            root = torch.linalg.vector_norm(values, dim=2, dtype=torch.float32) / ROOT_UNIT
            squares, left, right = root.square(), means, means
        scatter = torch.addcmul(squares, left, right, value=-length / SCATTER_UNIT)
        scatter = scatter if with_covariance else scatter.clamp_(min=0)
    elif values.is_cuda and not with_covariance:  # one read; on a CPU it takes ten times as long
        variance, means = torch.var_mean(values, 2, correction=0)
        scatter = variance * (length / SCATTER_UNIT)
    else:
        means = values.mean(2)
        centered = torch.add(means[..., None] / -ROOT_UNIT, values, alpha=1 / ROOT_UNIT, out=x.scratch)
        if with_covariance:
            scatter = torch.bmm(centered, centered.mT)
        elif x.channels_last:  # torch is slow at a norm over positions that are not side by side
            scatter = centered.square_().sum(2)
        else:
            scatter = torch.linalg.vector_norm(centered, dim=2).square()
    return _by_sample(means, x), _by_sample(scatter, x)


def apply(
    x: GroupedMap, matrix: Tensor, constant: Optional[Tensor], residual: Optional[Tensor] = None, relu: bool = False
) -> Tensor:
    """Return relu(M x + c + residual), of the shape, dtype and memory format of the map.

    M is (N, G, d, d) and c (N, G, d); c and the shortcut, of the shape of the map, may be None.
    """
    matrix, constant = (None if t is None else t.flatten(0, 1).to(x.values.dtype) for t in (matrix, constant))
    out = _as_map(_product(matrix, x.values, constant, x), x)
    if residual is not None:
        out += residual
    return out.relu_() if relu else out


def reduce_backward(
    grad: Tensor, x: GroupedMap, out: Optional[Tensor] = None, with_constant: bool = True
) -> tuple[Tensor, Optional[Tensor], Tensor, GroupedMap]:
    """Return dM = dy x^T, (N, G, d, d), dc = sum(dy), (N, G, d), dy, and dy prepared for ``apply_backward``.

    ``grad`` is the gradient of what ``apply`` returned; dy that before the ReLU, whose output ``out`` was, and of the
    shortcut.
    """
    dy_map = grad if out is None else torch.ops.aten.threshold_backward(grad, out, 0)
    dy = group(dy_map, x.values.shape[1], x.values.dtype, x.channels_last)
    d_matrix = _sum_of_products(dy.values, x.values)
    d_constant = _by_sample(dy.values.sum(2, dtype=d_matrix.dtype), x) if with_constant else None
    return _by_sample(d_matrix, x), d_constant, dy_map, dy


def apply_backward(dy: GroupedMap, x: GroupedMap, matrix: Tensor, k_matrix: Tensor, k_vector: Tensor) -> Tensor:
    """Return dx = M^T dy + K x - k, of the shape, dtype and memory format of the map.

    ``dy`` is the gradient before the ReLU. K is (N, G, d, d), symmetric, or where it is diagonal its diagonal.
    """
    matrix, k_matrix, k_vector = (t.flatten(0, 1).to(x.values.dtype) for t in (matrix, k_matrix, -k_vector))
    on_cuda = x.values.is_cuda or x.values.element_size() == 2
    if k_matrix.dim() == 2 and not on_cuda:  # there addcmul is slow at broadcasting what it adds to
        return _as_map(_product(matrix.mT, dy.values, k_vector, x).addcmul_(k_matrix[..., None], x.values), x)
    if k_matrix.dim() == 2:
        dx = torch.addcmul(k_vector[..., None], k_matrix[..., None], x.values)
    else:
        dx = _product(k_matrix, x.values, k_vector, x)
    if x.channels_last:
        dx.mT.baddbmm_(dy.values.mT, matrix)
    else:
        dx.baddbmm_(matrix.mT, dy.values)
    return _as_map(dx, x)


def _product(matrix: Tensor, values: Tensor, constant: Optional[Tensor], x: GroupedMap) -> Tensor:
    """Return M v + c, (N G, d, L), in the scratch of ``x`` if it has one.

    Of a channels_last map the transpose is contiguous: torch would multiply group by group into strides, which takes
    longer than a copy of the product does.
    """
    left, right, constant = matrix, values, None if constant is None else constant[..., None]
    if x.channels_last:
        left, right, constant = right.mT, left.mT, None if constant is None else constant.mT
    if constant is None or right.is_cuda:  # baddbmm would write the constant out in full first
        product = torch.bmm(left, right, out=x.scratch)
        if constant is not None:
            product.add_(constant)
    else:
        product = torch.baddbmm(constant, left, right, out=x.scratch)
    return product.mT if x.channels_last else product


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T, summed over positions, in float32 at least.

    An older torch rounds the sums of 16-bit maps to 16 bits, as those of a convolution's weights are.
    """
    if left.element_size() == 2 and _bmm_sums_in_float32(left.device, left.dtype):
        return torch.bmm(left, right.mT, out_dtype=torch.float32)
    sums = torch.bmm(left, right.mT)
    return sums.float() if left.element_size() == 2 else sums


def _reads_once(values: Tensor) -> bool:
    """Return whether BatchNorm's own function gives means and variances, in float32, from one read of 16-bit values.

    ``torch.var_mean`` would round both to 16 bits. On a CPU this rounds too; fake tensors and ONNX lack it.
    """
    is_recorded = precision.is_tracing() or compat.is_compiling()
    return values.is_cuda and values.is_contiguous() and type(values) is Tensor and not is_recorded


@torch.compiler.assume_constant_result
@functools.lru_cache(maxsize=None)
def _bmm_sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch multiplies 16-bit matrices into float32 ones on a device: on CUDA since torch 2.8."""
    matrix = torch.ones(1, 8, 8, dtype=dtype, device=device)
    try:
        return torch.bmm(matrix, matrix, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):
        return False


def _by_sample(tensor: Tensor, x: GroupedMap) -> Tensor:
    """Return what was computed of each matrix of a map, (N G, ...), as (N, G, ...)."""
    return tensor.view(x.map.shape[0], -1, *tensor.shape[1:])


def _as_map(values: Tensor, like: GroupedMap) -> Tensor:
    """Return (N G, d, L) matrices in the shape, dtype and memory format of a map."""
    (n, c, h, w), (_, d, length) = like.map.shape, values.shape
    if not like.channels_last:
        return values.view(n, c, h, w).to(like.map.dtype)
    by_position = values.mT.to(like.map.dtype).view(n, -1, length, d).transpose(1, 2)
    return by_position.reshape(n, h, w, c).permute(0, 3, 1, 2)
