"""Channel Equilibrium in one matrix product: the form that trains.

Everything that CE does to a map x is linear in it once its statistics are known, CE(x_n) = M_n x_n by channel group. So
is the norm before it, x = a z + b, and a 1x1 convolution before that, z = W h; and every statistic follows from the
means and covariances of h. So h is reduced, then multiplied once; what lies between are small matrices:

    m, S = reduce(h)                                 a reduction
    m, S -> [V | b] -> v, Sigma, s -> gate, P_T -> M   small matrices; x = V h + b
    y = relu(M V h + M b + shortcut)                 a product, with the end of a residual block in it

Without the convolution h = z, and without the norm h = x. z and x themselves are never made. The backward pass keeps
nothing of the size of a map but h and, with a ReLU, y:

    dy -> 0 where y = 0                              the gradient of the shortcut
    d[M V | M b] = dy h^T, sum(dy)                   a reduction
    d[M V | M b] -> dparameters, dv, dSigma -> K, k  small matrices
    dh = (M V)^T dy + K (h - m) + k                  two products; one where K is diagonal

docs/channel_equilibrium.md derives it all.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .. import compat
from . import maps, precision
from .coefficients import coefficients, coefficients_backward
from .records import Coefficients, Parameters, Saved, Settings, Statistics


def channel_equilibrium(
    x: Tensor,
    theta: Tensor,
    fc1_weight: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc2_weight: Tensor,
    *,
    group_size: int,
    num_iterations: int = 3,
    eps: float = 1e-5,
    running_whitening: Optional[Tensor] = None,
    running_scale: Optional[Tensor] = None,
    alpha: Optional[Tensor] = None,
    conv_weight: Optional[Tensor] = None,
    norm: Optional[nn.BatchNorm2d] = None,
    shortcut: Optional[Tensor] = None,
    relu: bool = False,
    process_group: Optional[dist.ProcessGroup] = None,
) -> tuple[Tensor, Statistics]:
    """Return relu(CE(norm(conv(x))) + shortcut); tests/reference.py has the same, equation by equation.

    Statistics, iteration and gate are computed in float32 at least, under autocast too, and in float64 where a training
    takes more than 8 Newton steps.

    Args:
        x: (N, C, H, W), or the input of the norm or of the convolution where these are given. Input that is neither
            contiguous nor channels_last is copied to the contiguous format first.
        theta: (1,), lambda is its sigmoid.
        fc1_weight: (C / r, C), W1 of the gate.
        ln_weight: (C / r,), the scale of the gate's LayerNorm.
        ln_bias: (C / r,), its shift.
        fc2_weight: (C, C / r), W2 of the gate.
        group_size: Channels d of a decorrelation group; divides C.
        num_iterations: Newton steps T.
        eps: Ridge added to the covariance.
        running_whitening: (G, d, d), P_T of the evaluation form; None for the training form.
        running_scale: (1,), s of the evaluation form; None for the training form.
        alpha: (1,), the share of CE in the output, the rest being the input; None for CE alone.
        conv_weight: (C, C_in, 1, 1), of a 1x1 convolution before the norm; then there is a norm.
        norm: The norm before CE. In training it uses the statistics of this process's batch, and its running values
            move.
        shortcut: The shortcut of a residual block, added to the output, whose shape it has.
        relu: Whether ReLU comes last, as in a residual block.
        process_group: The processes whose samples are CE's batch in training, as in SyncBN; None for this one alone.
            Every process must call the function, and run its backward pass, equally often.

    Returns:
        The output, like ``x`` and differentiable once, and the statistics it was computed with, constants.

    Raises:
        ValueError: If one of the running values is given without the other.
    """
    if (running_whitening is None) != (running_scale is None):
        raise ValueError('the evaluation form needs both running_whitening and running_scale; got one of them')
    trains = running_whitening is None
    settings = Settings(
        group_size=group_size,
        num_iterations=num_iterations,
        eps=eps,
        running_whitening=running_whitening,
        running_scale=running_scale,
        norm=norm,
        norm_trains=norm is not None and (norm.training or norm.running_mean is None),
        process_group=process_group if trains else None,
        dtype=precision.dtype_of(x, num_iterations if trains else 0),
    )
    parameters = Parameters(
        theta=theta,
        alpha=alpha,
        conv_weight=conv_weight,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        fc1_weight=fc1_weight,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
        fc2_weight=fc2_weight,
    )
    with compat.without_autocast(x.device.type):
        if not precision.is_tracing():
            out, *statistics = _ChannelEquilibrium.apply(x, shortcut, relu, settings, *parameters)
            return out, Statistics._make(statistics)
        # The same, in operations that a trace records
        out, c = _forward(x, shortcut, relu, settings, parameters)
        # Copied: adding to a view in place would put reshapes around all that follows in an exported graph
        out = out.clone(memory_format=torch.channels_last if maps.is_channels_last(x) else torch.contiguous_format)
        return out, c.statistics


def _forward(
    x: Tensor, shortcut: Optional[Tensor], relu: bool, settings: Settings, parameters: Parameters
) -> tuple[Tensor, Coefficients]:
    """Return the output, and M V with its statistics."""
    h = maps.group(
        x,
        _block_size(x, settings, parameters),
        settings.dtype,
        maps.is_channels_last(x),
        with_scratch=not precision.is_tracing(),
    )
    needs_covariance = settings.trains or parameters.conv_weight is not None
    c = coefficients(maps.moments(h, needs_covariance), x.shape[2] * x.shape[3], parameters, settings)
    return maps.apply(h, x, _for_map(c.matrix, h), shortcut, relu), c


def _block_size(x: Tensor, settings: Settings, parameters: Parameters) -> int:
    """Return the channels of a block of h: all that go into a convolution, or a group."""
    return settings.group_size if parameters.conv_weight is None else x.shape[1]


def _for_map(matrix: Tensor, h: maps.GroupedMap) -> Tensor:
    """Return (N, G, d, J + 1) as (N B, R, J + 1): the rows that belong to each block of h."""
    num_rows = matrix.shape[1] * matrix.shape[2] // h.means.shape[1]
    return matrix.reshape(h.values.shape[0], num_rows, matrix.shape[3])


class _ChannelEquilibrium(torch.autograd.Function):
    """The forward and the backward pass as described at the top."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        shortcut: Optional[Tensor],
        relu: bool,
        settings: Settings,
        *parameters: Optional[Tensor],
    ) -> tuple[Optional[Tensor], ...]:
        parameters = Parameters._make(parameters)
        out, c = _forward(x, shortcut, relu, settings, parameters)
        ctx.settings = settings
        # torch.compile allows no look at the layout in a backward pass
        ctx.channels_last = maps.is_channels_last(x)
        kept = dict(x=x, out=out if relu else None, **parameters._asdict(), **c.saved._asdict())
        ctx.names = tuple(kept)
        ctx.save_for_backward(*kept.values())
        ctx.mark_non_differentiable(*(t for t in c.statistics if t is not None))
        ctx.set_materialize_grads(False)  # for the statistics autograd would fill tensors with zeros
        # Detached: autograd forbids changing a function's output in place where it is a view.
        return out.detach(), *c.statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Optional[Tensor], *_: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        kept = dict(zip(ctx.names, ctx.saved_tensors))
        x = kept.pop('x')
        out = kept.pop('out')
        parameters = Parameters(**{name: kept.pop(name) for name in Parameters._fields})
        saved = Saved(**kept)
        settings = ctx.settings
        length = x.shape[2] * x.shape[3]
        if grad is None:  # another process may wait for this one's sums
            n, num_groups, group_size, _ = saved.matrix.shape
            grad = x.new_zeros(n, num_groups * group_size, *x.shape[2:])
        with compat.without_autocast(x.device.type):
            block_size = _block_size(x, settings, parameters)
            h = maps.group(x, block_size, settings.dtype, ctx.channels_last, means=saved.means)
            matrix = _for_map(saved.matrix, h)
            d_matrix, d_shortcut, dy = maps.reduce_backward(grad, h, matrix.shape[1], out)
            gradients = coefficients_backward(d_matrix.view_as(saved.matrix), length, saved, parameters, settings)
            d_x = None
            if ctx.needs_input_grad[0]:
                k_matrix = gradients.k_matrix.flatten(0, 1)
                k_vector = None if gradients.k_vector is None else gradients.k_vector.flatten(0, 1)
                d_x = maps.apply_backward(dy, h, x, matrix, k_matrix, k_vector)
        if not ctx.needs_input_grad[1]:
            d_shortcut = None
        return d_x, d_shortcut, None, None, *gradients.parameters
