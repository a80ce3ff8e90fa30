"""y = M x, where M is a function of the moments of x: the one-matrix form of Channel Equilibrium.

Everything that CE does to a feature map is linear in it once its statistics are known, and every statistic follows
from two reductions, the per-sample sums and the per-sample Gram matrices x x^T. So the large tensor is reduced once
and multiplied once; what lies between are small matrices, left to autograd. The backward pass works the same way:

    dM = dy x^T                            a reduction
    dM -> dGram, dsum, parameters          autograd, small matrices
    dx = M^T dy + (dGram + dGram^T) x + dsum

and keeps nothing for it but x. A norm in evaluation is an affine map a z + b, so CE after it is M (a z + b): the moments
of x follow from those of z, and neither x nor anything else of its size is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class Moments(NamedTuple):
    """First and second moments of a feature map, by channel group and by sample."""

    variance: Tensor  # (N, C), unbiased, over the positions of one sample; 0 for a 1x1 map
    mean: Optional[Tensor]  # (G, d, 1), over all samples and positions
    covariance: Optional[Tensor]  # (G, d, d), biased, over all samples and positions


class Affine(NamedTuple):
    """A norm in evaluation: x = weight * z + bias, both (C,)."""

    weight: Tensor
    bias: Tensor


def affine_of(norm: _BatchNorm) -> Affine:
    """Return the affine map that a BatchNorm in evaluation is, in float32 at least."""
    weight = torch.rsqrt(_at_least_float32(norm.running_var) + norm.eps)
    if norm.affine:
        weight = norm.weight * weight
    bias = -norm.running_mean * weight
    return Affine(weight, bias + norm.bias if norm.affine else bias)


def mix(
    x: Tensor,
    group_size: int,
    matrix_of: Callable[[Moments], Tensor],
    parameters: Sequence[Tensor] = (),
    *,
    with_covariance: bool = True,
    affine: Optional[Affine] = None,
) -> Tensor:
    """Multiply each channel group of each sample by a matrix that depends on the moments.

    Args:
        x: (N, C, H, W), or the input z of the norm where ``affine`` is given.
        group_size: Channels d of a group; divides C.
        matrix_of: From the moments to M, (N, G, d, d). Called once.
        parameters: The leaf tensors, beside the moments, that ``matrix_of`` is to be differentiated by.
        with_covariance: Whether ``matrix_of`` reads mean and covariance; without, only variances are computed.
        affine: The norm in evaluation before CE, folded into M.

    Returns:
        (N, C, H, W), in the dtype and memory format of ``x``. Differentiable once.
    """
    length = x.shape[2] * x.shape[3]

    def matrix_and_bias(sums: Tensor, squares: Tensor, *affine: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        weight, bias = (t.reshape(-1, group_size) for t in affine) if affine else (None, None)  # (G, d)
        matrix = matrix_of(_moments(sums, squares, length, weight, bias))
        if not affine:
            return matrix, None
        return matrix * weight[:, None, :], matrix @ bias[:, :, None]

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out = _Mix.apply(
            x, group_size, matrix_and_bias, with_covariance, affine is not None, *(affine or ()), *parameters
        )
    else:
        groups = _groups(x, group_size)
        out = (
            _multiply(*matrix_and_bias(*_reduce(groups, with_covariance), *(affine or ())), groups)
            .to(x.dtype)
            .view(x.shape)
        )
    return out.contiguous(memory_format=_memory_format(x))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _groups(x: Tensor, group_size: int) -> Tensor:
    """Return (N, C, H, W) as (N, G, d, L), in float32 at least; a view where possible."""
    return _at_least_float32(x).reshape(x.shape[0], -1, group_size, x.shape[2] * x.shape[3])


def _flat(matrices: Tensor) -> Tensor:
    """View (N, G, ...) as (N G, ...)."""
    return matrices.flatten(0, 1)


def _reduce(groups: Tensor, with_covariance: bool) -> tuple[Tensor, Tensor]:
    """Return the sums over positions, (N, G, d), and the Gram matrices, (N, G, d, d), or only their diagonals."""
    sums = groups.sum(3)
    if not with_covariance:
        return sums, torch.linalg.vector_norm(groups, dim=3).square()  # squares nothing of the size of x
    flat = _flat(groups)
    return sums, torch.bmm(flat, flat.transpose(1, 2)).unflatten(0, groups.shape[:2])


def _multiply(matrix: Tensor, bias: Optional[Tensor], groups: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """Return M x + bias, (N G, d, L), in ``out`` if given."""
    if bias is None:
        return torch.bmm(_flat(matrix), _flat(groups), out=out)
    return torch.baddbmm(_flat(bias), _flat(matrix), _flat(groups), out=out)


def _moments(sums: Tensor, squares: Tensor, length: int, weight: Optional[Tensor], bias: Optional[Tensor]) -> Moments:
    """Return the moments of x from the reductions of x, or of the z with x = weight * z + bias, both (G, d)."""
    mean = sums / length  # (N, G, d)
    diagonal = squares if squares.dim() == 3 else squares.diagonal(dim1=2, dim2=3)
    # Rounding can leave a constant channel with a tiny negative sum of squared deviations.
    variance = (diagonal - mean * sums).clamp_min(0) / max(length - 1, 1)
    if weight is not None:
        variance = variance * weight.square()
    if squares.dim() == 3:
        return Moments(variance.flatten(1), None, None)
    mean = mean.mean(0)[..., None]  # (G, d, 1)
    covariance = squares.mean(0) / length - mean @ mean.transpose(1, 2)
    if weight is not None:
        mean = weight[..., None] * mean + bias[..., None]
        covariance = weight[:, :, None] * covariance * weight[:, None, :]
    return Moments(variance.flatten(1), mean, covariance)


class _Mix(torch.autograd.Function):
    """The product and its backward pass as described at the top; saves x alone."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        group_size: int,
        matrix_and_bias: Callable,
        with_covariance: bool,
        with_affine: bool,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.group_size = group_size
        groups = _groups(x, group_size)
        statistics = _reduce(groups, with_covariance)
        affine, parameters = (inputs[:2], inputs[2:]) if with_affine else ((), inputs)
        # The affine map's weight and bias depend on each other outside; detached, each gets its own partial derivative.
        ctx.leaves = [t.detach().requires_grad_(t.requires_grad) for t in affine]
        ctx.statistics = [t.detach().requires_grad_() for t in statistics]
        with torch.enable_grad():  # records a graph of small matrices only
            ctx.matrix, ctx.bias = matrix_and_bias(*ctx.statistics, *ctx.leaves)
        ctx.leaves += parameters
        bias = None if ctx.bias is None else ctx.bias.detach()
        # Written into a tensor of the final shape: autograd lets nobody change a function's output that is a view.
        out = groups.new_empty(x.shape)
        _multiply(ctx.matrix.detach(), bias, groups, out=_flat(out.view(groups.shape)))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            groups, dy = _flat(_groups(x, ctx.group_size)), _flat(_groups(grad, ctx.group_size))
            outputs, grads = [ctx.matrix], [torch.bmm(dy, groups.transpose(1, 2)).view_as(ctx.matrix)]
            if ctx.bias is not None:
                outputs.append(ctx.bias)
                grads.append(dy.sum(2).view_as(ctx.bias))
            wanted = [*ctx.statistics, *(t for t in ctx.leaves if t.requires_grad)]
            # retain_graph: it goes when ctx does, and a user may retain the outer graph
            dsums, dsquares, *dinputs = torch.autograd.grad(
                outputs, wanted, grads, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            dx = None
            if ctx.needs_input_grad[0]:
                if dsquares.dim() == 3:
                    dsquares = dsquares.diag_embed()
                dx = torch.baddbmm(_flat(dsums)[..., None], _flat(ctx.matrix.detach()).transpose(1, 2), dy)
                dx.baddbmm_(_flat(dsquares + dsquares.transpose(2, 3)), groups)
                dx = dx.to(x.dtype).view(x.shape)
        rest = iter(dinputs)
        return dx, None, None, None, None, *(next(rest) if t.requires_grad else None for t in ctx.leaves)
