"""Channel Equilibrium in one matrix product: the form that trains.

Everything that CE does to a feature map is linear in it once its statistics are known, CE(x_n) = M_n x_n by channel
group, and every statistic follows from two reductions, each sample's means m and its scatter S = (x - m)(x - m)^T. So
the map is reduced, then multiplied once; what lies between are small matrices:

    m, S = reduce(x)                              a reduction
    m, S -> v, Sigma, s -> gate, P_T -> M, c      small matrices
    y = relu(M x + c + shortcut)                  a product, with the end of a residual block in it

The backward pass keeps nothing of the size of x but x and, with a ReLU, y:

    dy -> 0 where y = 0                           the gradient of the shortcut
    dM, dc = dy x^T, sum(dy)                      a reduction
    dM, dc -> dparameters, dv, dSigma -> K, k     small matrices
    dx = M^T dy + K x - k                         two products; one in evaluation, where K is diagonal

A norm in evaluation is an affine map x = a z + b, so CE after it is M (a z + b): the moments of x follow from those of
z, and only z is kept. docs/channel_equilibrium.md derives it all.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .. import compat
from . import dispatch, precision
from .maps import is_channels_last
from .records import Coefficients, Inputs, Options


class CEOutput(NamedTuple):
    """The output of Channel Equilibrium and the statistics it was computed with."""

    out: Tensor  # (N, C, H, W)
    mean: Optional[Tensor]  # (G, d, 1), mu of the batch; None in evaluation
    whitening: Tensor  # (G, d, d), P_T of the batch, or the running one in evaluation
    scale: Tensor  # (1,), s of the batch, or the running one in evaluation


def channel_equilibrium(
    x: Tensor,
    theta: Tensor,
    fc1_weight: Optional[Tensor],
    ln_weight: Optional[Tensor],
    ln_bias: Optional[Tensor],
    fc2_weight: Optional[Tensor],
    *,
    group_size: int,
    num_iterations: int = 3,
    eps: float = 1e-5,
    running_whitening: Optional[Tensor] = None,
    running_scale: Optional[Tensor] = None,
    alpha: Optional[Tensor] = None,
    logits: Optional[Tensor] = None,
    norm: Optional[nn.BatchNorm2d] = None,
    residual: Optional[Tensor] = None,
    relu: bool = False,
    process_group: Optional[dist.ProcessGroup] = None,
) -> CEOutput:
    """Apply Channel Equilibrium to ``x``: ``channel_equilibrium_reference``, fast.

    Training form unless both running values are given. Statistics, iteration and gate are computed in float32 at least,
    under autocast too, and in float64 where a training takes more than 8 Newton steps.

    Args:
        x: (N, C, H, W), or the input z of the norm where ``norm`` is given. Input that is neither contiguous nor
            channels_last is copied to the contiguous format first.
        theta: (1,), lambda is its sigmoid.
        fc1_weight: (C / r, C), W1 of the gate.
        ln_weight: (C / r,), the scale of the gate's LayerNorm.
        ln_bias: (C / r,), its shift.
        fc2_weight: (C, C / r), W2 of the gate.
        group_size: Channels d of a decorrelation group; divides C.
        num_iterations: Newton steps T.
        eps: Ridge added to the covariance.
        running_whitening: (G, d, d), P_T of the evaluation form.
        running_scale: (1,), s of the evaluation form.
        alpha: (1,), the share of CE in the output, the rest being the input; None for CE alone.
        logits: (N, C), of the gate, which autograd leads back to x; None to compute them from the four weights.
        norm: The norm before CE, in evaluation, folded into M.
        residual: The shortcut of a residual block, added to the output; of the shape of ``x``.
        relu: Whether ReLU comes last, as in a residual block.
        process_group: The processes whose samples are the batch in training, as in SyncBN; None for this one alone.
            Every process must call the function, and run its backward pass, equally often.

    Returns:
        The output, like ``x`` and differentiable once, and the statistics it was computed with, constants.
    """
    training = running_whitening is None or running_scale is None
    group, running = (process_group, None) if training else (None, (running_whitening, running_scale))
    dtype = precision.dtype_of(x, num_iterations if training else 0)
    norm_eps = 0.0 if norm is None else norm.eps
    options = Options(group_size, num_iterations, eps, norm_eps, running, group, map_dtype=dtype, dtype=dtype)
    of_norm = (None,) * 4 if norm is None else (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    of_gate = (fc1_weight, ln_weight, ln_bias, fc2_weight, *(() if logits is None else (logits,)))
    inputs = (*of_norm, alpha, theta, *of_gate)
    form = dispatch.choose(x, residual, relu, Inputs(*inputs), options)
    if norm is not None and form is dispatch.TORCH and precision.stays_16_bit(x):
        # Folded, M z and c would be rounded to 16 bits, and they cancel where the channels of z have means
        x, options, inputs = norm(x), options._replace(norm_eps=0.0), (*(None,) * 4, alpha, theta, *of_gate)
    with compat.without_autocast(x.device.type):
        if precision.is_tracing():  # the same, in operations that a trace records
            out, c, _ = _forward(x, residual, relu, form, options, Inputs(*inputs))
            # Copied: adding to a view in place would put reshapes around all that follows in an exported graph
            out = out.clone(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
            statistics = [None if t is None else t.detach() for t in (c.mean, c.whitening, c.scale)]
        else:
            out, *statistics = _ChannelEquilibrium.apply(x, residual, relu, form, options, *inputs)
    return CEOutput(out, *statistics) if training else CEOutput(out, None, running_whitening, running_scale)


def _forward(
    x: Tensor, residual: Optional[Tensor], relu: bool, form: dispatch.Forms, options: Options, inputs: Inputs
) -> tuple[Tensor, Coefficients, bool]:
    """Return the output, M with its statistics, and whether the map is channels_last."""
    z = form.maps.group(x, options.group_size, options.map_dtype, with_scratch=not precision.is_tracing())
    sample_means, scatter = form.maps.reduce(z, options.running is None)
    c = form.coefficients.coefficients(sample_means, scatter, x.shape[2] * x.shape[3], inputs, options)
    return form.maps.apply(z, c.matrix, c.constant, residual, relu), c, z.channels_last


class _ChannelEquilibrium(torch.autograd.Function):
    """The forward and the backward pass as described at the top."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        residual: Optional[Tensor],
        relu: bool,
        form: dispatch.Forms,
        options: Options,
        *inputs: Optional[Tensor],
    ) -> tuple[Optional[Tensor], ...]:
        # the layout too, since torch.compile allows no look at one in a backward pass
        out, c, ctx.channels_last = _forward(x, residual, relu, form, options, Inputs(*inputs))
        ctx.form, ctx.options, ctx.num_inputs = form, options, len(inputs)
        ctx.save_for_backward(x, out if relu else None, c.matrix, *inputs, *c.saved)
        statistics = (c.mean, c.whitening, c.scale)
        ctx.mark_non_differentiable(*(t for t in statistics if t is not None))
        ctx.set_materialize_grads(False)  # for the statistics autograd would fill tensors with zeros
        # Detached: autograd forbids changing a function's output in place where it is a view.
        return out.detach(), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Optional[Tensor], *_: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        x, out, matrix, *tensors = ctx.saved_tensors
        inputs, saved = Inputs(*tensors[: ctx.num_inputs]), tuple(tensors[ctx.num_inputs :])
        maps, coefficients = ctx.form
        grad = torch.zeros_like(x) if grad is None else grad  # another process may wait for this one's sums
        with compat.without_autocast(x.device.type):
            z = maps.group(x, ctx.options.group_size, ctx.options.map_dtype, ctx.channels_last)
            has_norm = inputs.norm_running_mean is not None
            d_matrix, d_constant, d_residual, dy = maps.reduce_backward(grad, z, out, has_norm)
            k_matrix, k_vector, d_inputs = coefficients.coefficients_backward(
                saved, x.shape[2] * x.shape[3], d_matrix, d_constant, inputs, ctx.options
            )
            d_x = maps.apply_backward(dy, z, matrix, k_matrix, k_vector) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            d_residual = None
        return d_x, d_residual, None, None, None, None, None, *d_inputs
