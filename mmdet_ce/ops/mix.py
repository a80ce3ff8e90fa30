"""y = M x, where M is a function of the moments of x: the one-matrix form of Channel Equilibrium.

Everything that CE does to a feature map is linear in it once its statistics are known, and every statistic follows
from two reductions, the per-sample sums and the per-sample Gram matrices x x^T. So the large tensor is reduced once
and multiplied once; what lies between are small matrices, left to autograd. The backward pass works the same way:

    dM = dy x^T                            a reduction
    dM -> dGram, dsum, parameters          autograd, small matrices
    dx = M^T dy + (dGram + dGram^T) x + dsum

and keeps nothing of the size of x for it but x. A norm in evaluation is an affine map a z + b, so CE after it is
M (a z + b): the moments of x follow from those of z, and only z is kept.

The reductions are taken about a pilot mean, a constant that cancels in every moment: about zero, a mean of many
standard deviations would cost float32 the variance's digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class Moments(NamedTuple):
    """First and second moments of a feature map, by channel group and by sample."""

    variance: Tensor  # (N, C), unbiased, over the positions of one sample; 0 for a 1x1 map
    mean: Optional[Tensor]  # (G, d, 1), over all samples and positions; a constant: no output of CE depends on it
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
    matrix_of: Callable[..., Tensor],
    parameters: Sequence[Tensor] = (),
    *,
    with_covariance: bool = True,
    affine: Optional[Affine] = None,
) -> Tensor:
    """Multiply each channel group of each sample by a matrix that depends on the moments.

    Args:
        x: (N, C, H, W), or the input z of the norm where ``affine`` is given.
        group_size: Channels d of a group; divides C.
        matrix_of: ``matrix_of(moments, *parameters)`` returns M, (N, G, d, d). Called once, with parameters that are
            detached from these.
        parameters: The tensors, beside the moments, that ``matrix_of`` is to be differentiated by.
        with_covariance: Whether ``matrix_of`` reads mean and covariance; without, only variances are computed.
        affine: The norm in evaluation before CE, folded into M.

    Returns:
        (N, C, H, W), in the dtype and memory format of ``x``. Differentiable once. Input that is not contiguous is
        copied to the contiguous format first.
    """
    inputs = (*(affine or ()), *parameters)
    call = _Call(group_size, matrix_of, with_covariance, affine is not None, torch.is_grad_enabled())
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        out = _Mix.apply(x, call, *inputs)
    else:  # the same in operations that compilers and tracers know
        groups = _groups(x, group_size)
        matrix, bias = call.matrix_and_bias(groups.shape[3], *_reduce(groups, with_covariance), *inputs)
        out = _multiply(matrix, bias, groups).to(x.dtype).view(x.shape)
    return out.contiguous(memory_format=_memory_format(x))


class _Call(NamedTuple):
    """The arguments of ``mix`` that are no tensors, and the small matrices that they ask for."""

    group_size: int
    matrix_of: Callable[..., Tensor]
    with_covariance: bool
    with_affine: bool
    with_grad: bool

    def matrix_and_bias(
        self, length: int, pilot: Tensor, sums: Tensor, squares: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Return M and the bias that the affine map adds, (N, G, d, 1)."""
        if not self.with_affine:
            return self.matrix_of(_moments(length, pilot, sums, squares), *inputs), None
        weight, bias = (t.reshape(-1, self.group_size) for t in inputs[:2])  # (G, d)
        matrix = self.matrix_of(_moments(length, pilot, sums, squares, weight, bias), *inputs[2:])
        return matrix * weight[:, None, :], matrix @ bias[:, :, None]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _groups(x: Tensor, group_size: int) -> Tensor:
    """Return (N, C, H, W) as (N, G, d, L), in float32 at least; a view of contiguous float32 or float64."""
    return _at_least_float32(x).reshape(x.shape[0], -1, group_size, x.shape[2] * x.shape[3])


def _flat(matrices: Tensor) -> Tensor:
    """View (N, G, ...) as (N G, ...)."""
    return matrices.flatten(0, 1)


def _reduce(groups: Tensor, with_covariance: bool, scratch: Optional[Tensor] = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return a pilot mean and the sums about it; ``scratch``, of the shape of ``groups``, is overwritten.

    With covariance the pilot is the batch's mean, (1, G, d); the sums over positions of x - pilot, (N, G, d), and of
    (x - pilot)(x - pilot)^T, (N, G, d, d), are each sample's. Without, the pilot is the sample's mean, (N, G, d), and
    only the diagonals of the products are computed, (N, G, d).
    """
    length = groups.shape[3]
    means = groups.mean(3)
    pilot = means.mean(0, keepdim=True) if with_covariance else means
    centred = torch.sub(groups, pilot[..., None], out=scratch)
    sums = length * (means - pilot)
    if not with_covariance:
        return pilot, sums, torch.linalg.vector_norm(centred, dim=3).square()
    flat = _flat(centred)
    return pilot, sums, torch.bmm(flat, flat.transpose(1, 2)).unflatten(0, groups.shape[:2])


def _moments(
    length: int,
    pilot: Tensor,
    sums: Tensor,
    squares: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
) -> Moments:
    """Return the moments of x from the sums of x, or from those of z where x = weight * z + bias, both (G, d)."""
    offset = sums / length  # (N, G, d), each sample's mean about the pilot
    diagonal = squares if squares.dim() == 3 else squares.diagonal(dim1=2, dim2=3)
    variance = (diagonal - offset * sums).clamp_min(0) / max(length - 1, 1)
    if weight is not None:
        variance = variance * weight.square()
    if squares.dim() == 3:
        return Moments(variance.flatten(1), None, None)
    mean, covariance = pilot.mean(0)[..., None], squares.sum(0) / (len(squares) * length)
    if weight is not None:
        mean = weight.detach()[..., None] * mean + bias.detach()[..., None]
        covariance = weight[:, :, None] * covariance * weight[:, None, :]
    return Moments(variance.flatten(1), mean, covariance)


def _multiply(matrix: Tensor, bias: Optional[Tensor], groups: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """Return M x + bias, (N G, d, L), in ``out`` if given."""
    if bias is None:
        return torch.bmm(_flat(matrix), _flat(groups), out=out)
    return torch.baddbmm(_flat(bias), _flat(matrix), _flat(groups), out=out)


class _Mix(torch.autograd.Function):
    """The product and its backward pass as described at the top."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, call: _Call, *inputs: Tensor) -> Tensor:
        groups = _groups(x, call.group_size)
        # Allocated in its final shape: autograd lets nobody change a function's output that is a view.
        out = groups.new_empty(x.shape)
        ctx.pilot, *sums = _reduce(groups, call.with_covariance, scratch=out.view(groups.shape))
        # Detached: a parameter's hooks run once, outside, and inputs that depend on each other get partial derivatives.
        ctx.sums = [t.requires_grad_() for t in sums]
        ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.set_grad_enabled(call.with_grad):  # records a graph of small matrices only
            ctx.matrix, ctx.bias = call.matrix_and_bias(groups.shape[3], ctx.pilot, *ctx.sums, *ctx.inputs)
        ctx.save_for_backward(x)
        bias = None if ctx.bias is None else ctx.bias.detach()
        _multiply(ctx.matrix.detach(), bias, groups, out=_flat(out.view(groups.shape)))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        (x,) = ctx.saved_tensors
        with no_autocast(x):
            group_size = ctx.matrix.shape[-1]
            groups, dy = _flat(_groups(x, group_size)), _flat(_groups(grad, group_size))
            outputs, grads = [ctx.matrix], [torch.bmm(dy, groups.transpose(1, 2)).view_as(ctx.matrix)]
            if ctx.bias is not None:
                outputs.append(ctx.bias)
                grads.append(dy.sum(2).view_as(ctx.bias))
            wanted = [*ctx.sums, *(t for t in ctx.inputs if t.requires_grad)]
            # retain_graph: it goes when ctx does, and a user may retain the outer graph
            dsums, dsquares, *dinputs = torch.autograd.grad(
                outputs, wanted, grads, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            dx = None
            if ctx.needs_input_grad[0]:
                if dsquares.dim() == 3:
                    dsquares = dsquares.diag_embed()
                symmetric = dsquares + dsquares.transpose(2, 3)
                constant = dsums[..., None] - symmetric @ ctx.pilot[..., None]
                dx = torch.baddbmm(_flat(constant), _flat(ctx.matrix.detach()).transpose(1, 2), dy)
                dx.baddbmm_(_flat(symmetric), groups)
                dx = dx.to(x.dtype).view(x.shape)
        rest = iter(dinputs)
        return dx, None, *(next(rest) if t.requires_grad else None for t in ctx.inputs)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which operations on ``x`` keep their dtype."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
