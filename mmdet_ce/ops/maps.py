"""The passes over a map, and the only place that knows how a map lies in memory.

A map is (N, C, H, W), contiguous or channels_last. ``group`` prepares it, as N G matrices of d channels and L = H W
positions; four passes then read or write it:

    reduce            m = mean(x), S = (x - m)(x - m)^T                    one reduction, by sample and group
    apply             y = relu(M x + c + shortcut)                         one product
    reduce_backward   dM = dy x^T, dc = sum(dy)                            one reduction
    apply_backward    dx = M^T dy + K x - k                                two products; one where K is diagonal

``triton_maps`` has the same functions for GPUs. Here, the passes are products of batches of matrices, (d, L) each. A
contiguous map is one batch of N G. Of a channels_last map only one sample's groups can be seen as a batch without a
copy, with strides (d, 1, C). ``_reads_by_strides`` chooses between N such batches and a copy that is one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import compat
from . import precision

# S is handed on in this unit, a power of two, which costs no digits: the sum of a map's squares leaves float32's range
# before their mean does. Up to 2**20 positions it does not exceed the largest square.
SCATTER_UNIT = 2.0**20
ROOT_UNIT = 2.0**10
# Elements of a sample from which a channels_last map is read by its strides. Of smaller samples, starting operations
# for each takes longer than a copy of the map: 1.1 times at 50,000 elements, 0.7 times at 200,000.
LEAST_SAMPLE = 2**17


class GroupedMap(NamedTuple):
    """A map as N G matrices."""

    batches: tuple[Tensor, ...]  # one of (N G, d, L), or N of (G, d, L); views of the map where they can be
    map: Tensor  # (N, C, H, W)
    channels_last: bool
    scratch: Optional[Tensor]  # of the shape of a batch: x - m, and where the product goes afterwards


def group(
    x: Tensor, group_size: int, dtype: torch.dtype, channels_last: Optional[bool] = None, with_scratch: bool = False
) -> GroupedMap:
    """Prepare a map for the passes.

    Args:
        x: (N, C, H, W). If it is neither contiguous nor channels_last it is copied to the contiguous format.
        group_size: Channels d of a group.
        dtype: The dtype to compute in. A 16-bit map on CUDA stays as it is where torch can sum its products in float32.
        channels_last: Which format to bring it into; None for its own.
        with_scratch: Whether ``reduce`` and ``apply`` follow, which share one buffer of the size of a batch.
    """
    channels_last = _is_channels_last(x) if channels_last is None else channels_last
    if not (x.is_cuda and x.element_size() == 2 and dtype == torch.float32 and _bmm_sums_in_float32()):
        converted = x.to(dtype)
    else:
        converted = x
    if channels_last:
        groups = _by_groups(converted.contiguous(memory_format=torch.channels_last), group_size)
        batches = groups.unbind() if _reads_by_strides(x) else (groups.mT.flatten(0, 1).contiguous().mT,)
    else:
        batches = (converted.reshape(-1, group_size, x.shape[2] * x.shape[3]),)
    # torch.compile takes no buffer that is transposed, and a 16-bit one would round x - m
    may_have_scratch = not channels_last or _reads_by_strides(x)
    has_scratch = with_scratch and may_have_scratch and batches[0].dtype == dtype
    return GroupedMap(batches, x, channels_last, torch.empty_like(batches[0]) if has_scratch else None)


def reduce(x: GroupedMap, with_covariance: bool) -> tuple[Tensor, Tensor]:
    """Return the means m of each sample's positions and the products summed about them.

    About zero instead of m, a mean of many standard deviations would cost float32 the digits of the variance. 16-bit
    maps are not harmed: their own rounding is larger than what the float32 sums lose.

    Their sums could overflow, though: of bfloat16 maps on CUDA from magnitudes of 1e16 on.

    Returns:
        m, (N, G, d), and the scatter S = (x - m)(x - m)^T, (N, G, d, d), or without covariance its diagonal, (N, G, d),
        divided by ``SCATTER_UNIT``.
    """
    moments = [_moments(values, x, with_covariance) for values in x.batches]
    means, scatter = zip(*moments)
    return _joined(means, x), _joined(scatter, x)


def _moments(values: Tensor, x: GroupedMap, with_covariance: bool) -> tuple[Tensor, Tensor]:
    """Return what ``reduce`` does for one batch of a map: (B, d), and (B, d, d) or (B, d)."""
    if values.element_size() == 2:
        means = values.mean(2, dtype=torch.float32)
        if with_covariance:
            scatter = torch.bmm(values, values.mT, out_dtype=torch.float32)
            one, all_positions = 1 / SCATTER_UNIT, values.shape[2] / SCATTER_UNIT
            return means, torch.baddbmm(scatter, means[:, :, None], means[:, None], beta=one, alpha=-all_positions)
        root = torch.linalg.vector_norm(values, dim=2, dtype=torch.float32) / ROOT_UNIT
        return means, torch.addcmul(root.square(), means, means, value=-values.shape[2] / SCATTER_UNIT).clamp_(min=0)
    means = values.mean(2)
    centered = torch.add(means[..., None] / -ROOT_UNIT, values, alpha=1 / ROOT_UNIT, out=x.scratch)
    if with_covariance:
        return means, torch.bmm(centered, centered.mT)
    if x.channels_last:  # torch is slow at a norm over positions that are not side by side
        return means, centered.square_().sum(2)
    return means, torch.linalg.vector_norm(centered, dim=2).square()


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
    parts = zip(_parts(matrix, x), x.batches, _parts(constant, x))
    buffer = _product_buffer(x)
    out = _as_map((_multiply(m, values, c, x, buffer) for m, values, c in parts), x)
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
    dy = group(dy_map, x.batches[0].shape[1], x.batches[0].dtype, x.channels_last)
    d_matrix = _joined([_sum_of_products(a, b) for a, b in zip(dy.batches, x.batches)], x)
    d_constant = None
    if with_constant:
        d_constant = _joined([values.sum(2, dtype=d_matrix.dtype) for values in dy.batches], x)
    return d_matrix, d_constant, dy_map, dy


def apply_backward(dy: GroupedMap, x: GroupedMap, matrix: Tensor, k_matrix: Tensor, k_vector: Tensor) -> Tensor:
    """Return dx = M^T dy + K x - k, of the shape, dtype and memory format of the map.

    Args:
        dy: The gradient before the ReLU.
        x: The map that M was applied to.
        matrix: M, (N, G, d, d).
        k_matrix: K, (N, G, d, d), symmetric, or where it is diagonal its diagonal, (N, G, d).
        k_vector: k, (N, G, d).
    """
    buffer = _product_buffer(x)
    parts = zip(_parts(matrix.mT, x), dy.batches, _parts(k_vector, x), _parts(k_matrix, x), x.batches)
    products = (
        _add_product(ks, values, _multiply(m, dy_values, k, x, buffer, sign=-1), x)
        for m, dy_values, k, ks, values in parts
    )
    return _as_map(products, x)


def _add_product(k_matrix: Tensor, values: Tensor, dx: Tensor, x: GroupedMap) -> Tensor:
    """Add K x, of one batch of a map, to ``dx``, (B, d, L), and return it."""
    k_matrix = k_matrix.to(dx.dtype)
    if k_matrix.dim() == 2:
        return dx.addcmul_(k_matrix[..., None], values)
    if x.channels_last:
        dx.mT.baddbmm_(values.mT, k_matrix)
        return dx
    return dx.baddbmm_(k_matrix, values)


def _multiply(
    matrix: Tensor,
    values: Tensor,
    constant: Optional[Tensor],
    x: GroupedMap,
    out: Optional[Tensor] = None,
    sign: int = 1,
) -> Tensor:
    """Return M x + sign c for one batch of a map, (B, d, L), in ``out`` if given.

    Of a channels_last map the transpose is contiguous: torch would multiply group by group into strides, which takes
    longer than a copy of the product does.
    """
    left, right = matrix.to(values.dtype), values
    if constant is not None:
        constant = constant[..., None].to(right.dtype)
    if x.channels_last:
        left, right, constant = right.mT, left.mT, None if constant is None else constant.mT
    if constant is None or right.is_cuda:  # baddbmm would write the constant out in full first
        product = torch.bmm(left, right, out=out)
        if constant is not None:
            product.add_(constant, alpha=sign)
    else:
        product = torch.baddbmm(constant, left, right, beta=sign, out=out)
    return product.mT if x.channels_last else product


def _product_buffer(x: GroupedMap) -> Optional[Tensor]:
    """Return where the product of each batch goes, in turn; None where torch allocates it.

    A channels_last map that is read by its strides has one buffer for all samples, (G, L, d): fresh memory for each
    would cost more than the product.
    """
    if not (x.channels_last and _reads_by_strides(x.map)):
        return None if x.channels_last else x.scratch
    memory = torch.empty_like(x.batches[0]) if x.scratch is None else x.scratch
    return memory.permute(2, 0, 1).view(memory.mT.shape)


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


def _reads_by_strides(x: Tensor) -> bool:
    """Return whether a channels_last map is read by its strides, sample by sample, or copied to one batch.

    A GPU would start a kernel for each sample, and a graph would hold operations for each.
    """
    if x.device.type != 'cpu' or precision.is_tracing() or compat.is_compiling():
        return False
    return x.numel() >= LEAST_SAMPLE * x.shape[0]


def _by_groups(x: Tensor, group_size: int) -> Tensor:
    """View (N, C, H, W), contiguous or channels_last, as (N, G, d, L)."""
    return x.flatten(2).unflatten(1, (-1, group_size))


def _parts(tensor: Optional[Tensor], x: GroupedMap) -> Sequence[Optional[Tensor]]:
    """Return small matrices, (N, G, ...), as the batches of a map are: (N G, ...), or N of (G, ...)."""
    if tensor is None:
        return (None,) * len(x.batches)
    whole = tensor.flatten(0, 1)
    return (whole,) if len(x.batches) == 1 else whole.chunk(len(x.batches))  # ONNX cannot split into one


def _joined(parts: Sequence[Tensor], x: GroupedMap) -> Tensor:
    """Return what was computed of each batch of a map as one tensor, (N, G, ...)."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.unflatten(0, (x.map.shape[0], -1))


def _as_map(batches: Iterable[Tensor], like: GroupedMap) -> Tensor:
    """Return batches of (d, L) matrices in the shape, dtype and memory format of a map."""
    if not like.channels_last:
        (values,) = batches
        return values.view(like.map.shape).to(like.map.dtype)
    out = torch.empty_like(like.map)
    groups = _by_groups(out, like.batches[0].shape[1])
    # one of several views could not be changed in place while tracing
    targets = (groups,) if len(like.batches) == 1 else groups.split(1)
    for target, values in zip(targets, batches):
        target.copy_(values.view_as(target))
    return out
