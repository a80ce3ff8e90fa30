"""y = M x, where M is a function of the moments of x: the one-matrix form of Channel Equilibrium.

Everything that CE does to a feature map is linear in it once its statistics are known, and every statistic follows
from two reductions, each sample's means m and its Gram matrices S = (x - m)(x - m)^T. (About zero instead of m, a mean
of many standard deviations would cost float32 the digits of the variance.) So the large tensor is reduced, then
multiplied once; what lies between are small matrices, left to autograd. The backward pass works the same way,

    dM = dy x^T                                       a reduction
    dM -> dm, dS, dparameters                         autograd, small matrices
    dx = M^T dy + (dS + dS^T)(x - m) + dm / L         two products

and keeps nothing of the size of x for it but x. A norm in evaluation is an affine map a z + b, so CE after it is
M (a z + b): the moments of x follow from those of z, and only z is kept.
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
        flat = _at_least_float32(_flat(x, group_size))
        matrix, bias = call.matrix_and_bias(x.shape, *_reduce(flat, with_covariance), *inputs)
        out = _multiply(matrix, bias, flat).to(x.dtype).view(x.shape)
    return out.contiguous(memory_format=_memory_format(x))


class _Call(NamedTuple):
    """The arguments of ``mix`` that are no tensors, and the small matrices that they ask for."""

    group_size: int
    matrix_of: Callable[..., Tensor]
    with_covariance: bool
    with_affine: bool
    with_grad: bool

    def matrix_and_bias(
        self, shape: torch.Size, means: Tensor, squares: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Return M, (N G, d, d), and the bias that the affine map adds, (N G, d, 1)."""
        n, _, h, w = shape
        means, squares = (t.unflatten(0, (n, -1)) for t in (means, squares))
        if not self.with_affine:
            return self.matrix_of(_moments(h * w, means, squares), *inputs).flatten(0, 1), None
        weight, bias = (t.reshape(-1, self.group_size) for t in inputs[:2])  # (G, d)
        matrix = self.matrix_of(_moments(h * w, means, squares, weight, bias), *inputs[2:])
        return (matrix * weight[:, None, :]).flatten(0, 1), (matrix @ bias[:, :, None]).flatten(0, 1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _flat(x: Tensor, group_size: int) -> Tensor:
    """Return (N, C, H, W) as (N G, d, L); a view of contiguous input."""
    return x.reshape(-1, group_size, x.shape[2] * x.shape[3])


def _reduce(flat: Tensor, with_covariance: bool, scratch: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """Return the means over positions, (N G, d), and the products summed about them.

    The products are (x - mean)(x - mean)^T, (N G, d, d), or without covariance their diagonals alone, (N G, d).
    ``scratch``, of the shape of ``flat``, is overwritten.
    """
    means = flat.mean(2)
    centred = torch.sub(flat, means[..., None], out=scratch)
    if with_covariance:
        return means, torch.bmm(centred, centred.transpose(1, 2))
    return means, torch.linalg.vector_norm(centred, dim=2).square()


def _moments(
    length: int, means: Tensor, squares: Tensor, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None
) -> Moments:
    """Return the moments of x from the reductions of x, or from those of z where x = weight * z + bias, both (G, d).

    Means are (N, G, d), squares (N, G, d, d) or (N, G, d).
    """
    with_covariance = squares.dim() == 4
    diagonal = squares.diagonal(dim1=2, dim2=3) if with_covariance else squares
    variance = diagonal / max(length - 1, 1)
    if weight is not None:
        variance = variance * weight.square()
    if not with_covariance:
        return Moments(variance.flatten(1), None, None)
    # The covariance over the batch: that within the samples, and that of their means.
    mean = means.mean(0)  # (G, d)
    between = (means - mean).transpose(0, 1)  # (G, N, d)
    covariance = squares.sum(0) / (len(squares) * length) + between.transpose(1, 2) @ between / len(means)
    if weight is not None:
        mean = weight * mean + bias
        covariance = weight[:, :, None] * covariance * weight[:, None, :]
    return Moments(variance.flatten(1), mean.detach()[..., None], covariance)


def _multiply(matrix: Tensor, bias: Optional[Tensor], flat: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """Return M x + bias, (N G, d, L), in ``out`` if given."""
    return torch.bmm(matrix, flat, out=out) if bias is None else torch.baddbmm(bias, matrix, flat, out=out)


class _Mix(torch.autograd.Function):
    """The product and its backward pass as described at the top."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, call: _Call, *inputs: Tensor) -> Tensor:
        flat = _at_least_float32(_flat(x, call.group_size))
        # Allocated in its final shape: autograd lets nobody change a function's output that is a view.
        out = flat.new_empty(x.shape)
        statistics = _reduce(flat, call.with_covariance, scratch=out.view(flat.shape))
        # Detached: a parameter's hooks run once, outside, and inputs that depend on each other get partial derivatives.
        ctx.statistics = [t.requires_grad_() for t in statistics]
        ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.set_grad_enabled(call.with_grad):  # records a graph of small matrices only
            ctx.matrix, ctx.bias = call.matrix_and_bias(x.shape, *ctx.statistics, *ctx.inputs)
        ctx.save_for_backward(x)
        bias = None if ctx.bias is None else ctx.bias.detach()
        _multiply(ctx.matrix.detach(), bias, flat, out=out.view(flat.shape))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        (x,) = ctx.saved_tensors
        flat, dy = (_at_least_float32(_flat(t, ctx.matrix.shape[-1])) for t in (x, grad))
        with no_autocast(x):
            outputs, grads = [ctx.matrix], [torch.bmm(dy, flat.transpose(1, 2))]
            if ctx.bias is not None:
                outputs.append(ctx.bias)
                grads.append(dy.sum(2, keepdim=True))
            wanted = [*ctx.statistics, *(t for t in ctx.inputs if t.requires_grad)]
            # retain_graph: it goes when ctx does, and a user may retain the outer graph
            dmeans, dsquares, *dinputs = torch.autograd.grad(
                outputs, wanted, grads, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            dx = None
            if ctx.needs_input_grad[0]:
                if dsquares.dim() == 2:
                    dsquares = dsquares.diag_embed()
                symmetric = dsquares + dsquares.transpose(1, 2)
                constant = dmeans[..., None] / flat.shape[2] - symmetric @ ctx.statistics[0].detach()[..., None]
                dx = torch.baddbmm(constant, ctx.matrix.detach().transpose(1, 2), dy)
                dx = dx.baddbmm_(symmetric, flat).to(x.dtype).view(x.shape)
        rest = iter(dinputs)
        return dx, None, *(next(rest) if t.requires_grad else None for t in ctx.inputs)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which operations on ``x`` keep their dtype."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
