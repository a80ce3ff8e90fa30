"""Channel Equilibrium in one matrix product: the form that trains.

Everything that CE does to a feature map is linear in it once its statistics are known, CE(x_n) = M_n x_n by channel
group, and every statistic follows from two reductions, each sample's means m and its Gram matrices
S = (x - m)(x - m)^T. (About zero instead of m, a mean of many standard deviations would cost float32 the digits of the
variance.) So the large tensor is reduced, then multiplied once; what lies between are small matrices. The backward pass
works the same way,

    dM = dy x^T                                   a reduction
    dM -> dm, dS, dparameters                     small matrices
    dx = M^T dy + 2 dS (x - m) + dm / L           two products; one in evaluation, where dS is diagonal

and keeps nothing of the size of x but x. A norm in evaluation is an affine map x = a z + b, so CE after it is
M (a z + b): the moments of x follow from those of z, and only z is kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .newton import inverse_sqrt_newton, inverse_sqrt_newton_derivative
from .reference import CEOutput

LAYER_NORM_EPS = 1e-5
MAX_FLOAT32_ITERATIONS = 8


class Affine(NamedTuple):
    """A norm in evaluation: x = weight * z + bias, both (C,)."""

    weight: Tensor
    bias: Tensor


def affine_of(norm: _BatchNorm) -> Affine:
    """Return the affine map that a BatchNorm in evaluation is, in float32 at least."""
    weight = torch.rsqrt(_at_least_float32(norm.running_var) + norm.eps)
    if not norm.affine:
        return Affine(weight, -norm.running_mean * weight)
    weight = norm.weight * weight
    return Affine(weight, torch.addcmul(norm.bias, norm.running_mean, weight, value=-1))


def channel_equilibrium(
    x: Tensor,
    theta: Tensor,
    fc1_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc2_weight: Tensor,
    *,
    group_size: int,
    num_iterations: int = 3,
    eps: float = 1e-5,
    running_whitening: Optional[Tensor] = None,
    running_scale: Optional[Tensor] = None,
    alpha: Optional[Tensor] = None,
    affine: Optional[Affine] = None,
    process_group: Optional[dist.ProcessGroup] = None,
) -> CEOutput:
    """Apply Channel Equilibrium to ``x``: ``channel_equilibrium_reference``, fast.

    Training form unless both running values are given. Statistics, iteration and gate are computed in float32 at least,
    under autocast too, and in float64 where a training takes more than 8 Newton steps.

    Args:
        x: (N, C, H, W), or the input z of the norm where ``affine`` is given. Input that is neither contiguous nor
            channels_last is copied to the contiguous format first.
        theta: (1,), lambda is its sigmoid.
        fc1_weight: (C / r, C), W1 of the gate.
        norm_weight: (C / r,), LayerNorm's scale.
        norm_bias: (C / r,), LayerNorm's shift.
        fc2_weight: (C, C / r), W2 of the gate.
        group_size: Channels d of a decorrelation group; divides C.
        num_iterations: Newton steps T.
        eps: Ridge added to the covariance.
        running_whitening: (G, d, d), P_T of the evaluation form.
        running_scale: (1,), s of the evaluation form.
        alpha: (1,), the share of CE in the output, the rest being the input; None for CE alone.
        affine: The norm in evaluation before CE, folded into M.
        process_group: The processes whose samples together are the batch of the training form, as in SyncBN; None for
            this process alone. Every process must call the function, and run its backward pass, equally often.

    Returns:
        The output, in the dtype and memory format of ``x``, differentiable once; and the statistics it was computed
        with, constants.
    """
    evaluation = running_whitening is not None and running_scale is not None
    running = (running_whitening, running_scale) if evaluation else None
    options = _Options(group_size, num_iterations, eps, running, None if evaluation else process_group)
    inputs = (*(affine or (None, None)), alpha, theta, fc1_weight, norm_weight, norm_bias, fc2_weight)
    with no_autocast(x):
        if torch.jit.is_tracing() or is_exporting():  # the same, in operations that a trace records
            flat = _flat(x, group_size, _working_dtype(x, options), channels_last=False)
            terms = _terms(*_reduce(flat, x.shape[0], not evaluation, False), flat.shape[2], options, *inputs)
            out = _multiply(terms.folded, flat, terms.constant, False).to(x.dtype).view(x.shape)
            # Copied: adding to a view in place would put reshapes around all that follows in an exported graph
            out = out.clone(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)
            statistics = [None if t is None else t.detach() for t in (terms.mean, terms.whitening, terms.scale)]
        else:
            out, *statistics = _ChannelEquilibrium.apply(x, options, *inputs)
    return CEOutput(out, *statistics)


def is_exporting() -> bool:
    """Return whether torch.export is tracing, and not torch.compile.

    Some versions of torch.compiler.is_exporting are true for both, and torch 2.6 has none.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which operations on ``x`` keep their dtype."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


class _Options(NamedTuple):
    """Arguments that no gradient is asked of."""

    group_size: int
    num_iterations: int
    eps: float
    running: Optional[tuple[Tensor, Tensor]]  # P_T and s, in evaluation
    process_group: Optional[dist.ProcessGroup]  # over which the batch extends, in training


class _Terms(NamedTuple):
    """What lies between the reductions and the product; None where the form of CE, or no norm before it, needs none."""

    means: Tensor  # (N, G, d), m, of z
    samples: Optional[Tensor]  # (1,), samples of all processes
    positions: Optional[Tensor]  # (1,), N L of all processes
    between: Optional[Tensor]  # (G, N, d), m less its mean over the samples
    covariance: Optional[Tensor]  # (G, d, d), of z over samples and positions, biased
    mean: Optional[Tensor]  # (G, d, 1), mu
    own_variance: Tensor  # (N, G, d), of the positions of z in a sample, unbiased; 0 for a 1x1 map
    variance: Tensor  # (N, C), v, that of x
    trace: Optional[Tensor]  # (G, 1, 1), of Sigma
    normalized: Optional[Tensor]  # (G, d, d), Sigma_N
    whitening: Tensor  # (G, d, d), P_T
    has_variance: Optional[Tensor]  # (1,), whether the variances are more than rounding
    scale: Tensor  # (1,), s
    hidden: Tensor  # (N, C / r), W1 v
    hidden_mean: Tensor  # (N, 1), LayerNorm's mean of it
    hidden_rstd: Tensor  # (N, 1), LayerNorm's reciprocal deviation of it
    rectified: Tensor  # (N, C / r), relu(LayerNorm(W1 v))
    gate: Tensor  # (N, C)
    lam: Tensor  # (1,), lambda
    reweighting: Tensor  # (N, C), (1 - lambda) gate / s
    equalizer: Tensor  # (N, G, d, d), M of CE alone
    matrix: Tensor  # (N, G, d, d), M
    folded: Tensor  # (N, G, d, d), M diag(a)
    constant: Optional[Tensor]  # (N, G, d, 1), M b


def _terms(
    means: Tensor,
    squares: Tensor,
    length: int,
    options: _Options,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    alpha: Optional[Tensor],
    *parameters: Tensor,
) -> _Terms:
    """Return the small matrices, by the equations of the paper, from the reductions of z."""
    n, g, d = means.shape
    theta, w1, norm_weight, norm_bias, w2 = (t.to(means.dtype) for t in parameters)
    if weight is not None:
        weight, bias = weight.to(means.dtype).view(g, d), bias.to(means.dtype).view(g, d)

    # The gate, from the variance of each sample's channels
    own_variance = (squares.diagonal(dim1=2, dim2=3) if options.running is None else squares) / max(length - 1, 1)
    variance = (own_variance if weight is None else own_variance * weight.square()).view(n, -1)
    hidden = F.linear(variance, w1)
    normed, *hidden_moments = torch.native_layer_norm(hidden, norm_bias.shape, norm_weight, norm_bias, LAYER_NORM_EPS)
    rectified = F.relu(normed)
    gate = torch.sigmoid(F.linear(rectified, w2))

    samples = positions = between = covariance = mean = trace = normalized = has_variance = None
    if options.running is None:
        sample_means = means if weight is None else torch.addcmul(bias, weight, means)
        center, mean_square = means.mean(0), sample_means.square().mean().view(1)
        mean_variance = variance.mean().view(1)
        group = options.process_group
        if group is not None:
            (center, positions), (mean_variance, samples), (mean_square, _) = _means_over_processes(
                group, (center, n * length), (mean_variance, n), (mean_square, n)
            )
        # Sigma: the covariance within the samples, and that of their means
        between = (means - center).transpose(0, 1)
        covariance = torch.baddbmm(squares.sum(0), between.transpose(1, 2), between, beta=1 / (n * length), alpha=1 / n)
        if group is not None:
            ((covariance, _),) = _means_over_processes(group, (covariance, n * length))
        mean, sigma = center[..., None], covariance
        if weight is not None:
            mean = torch.addcmul(bias, weight, center)[..., None]
            sigma = weight[:, :, None] * covariance * weight[:, None, :]
        sigma = torch.add(sigma, _eye(sigma), alpha=options.eps)
        trace = sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        normalized = sigma / trace
        whitening = inverse_sqrt_newton(normalized, options.num_iterations)
        # s. A batch without spatial variance (all-zero, constant or 1x1 maps; the network's first step when
        # zero_init_residual zeroes the norm before CE) has nothing to be equalized: s = 1, where the formula has 0/0.
        rounding = (8 * torch.finfo(variance.dtype).eps) ** 2
        has_variance = mean_variance > rounding * mean_square
        scale = torch.where(has_variance, mean_variance, 1.0).sqrt()
    else:
        # Copied: a training pass may update the buffers in place before the backward pass of this one
        whitening, scale = (t.to(means.dtype, copy=True) for t in options.running)

    # M = lambda P + (1 - lambda) diag(gate / s)
    lam = torch.sigmoid(theta)
    reweighting = (1 - lam) / scale * gate
    matrix = equalizer = lam * whitening + reweighting.view(n, g, d).diag_embed()
    if alpha is not None:
        matrix = torch.lerp(_eye(equalizer), equalizer, alpha.to(lam.dtype))
    folded, constant = matrix, None
    if weight is not None:
        folded, constant = matrix * weight[:, None, :], matrix @ bias[:, :, None]
    return _Terms(
        means, samples, positions, between, covariance, mean, own_variance, variance, trace, normalized, whitening,
        has_variance, scale, hidden, *hidden_moments, rectified, gate, lam, reweighting, equalizer, matrix, folded,
        constant,
    )  # fmt: skip


class _ChannelEquilibrium(torch.autograd.Function):
    """The forward and the backward pass as described at the top."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, options: _Options, *inputs: Optional[Tensor]) -> tuple[Tensor, ...]:
        channels_last = _is_channels_last(x)
        flat = _flat(x, options.group_size, _working_dtype(x, options), channels_last)
        buffer = None if channels_last else torch.empty_like(flat)  # torch.compile takes none that is transposed
        means, squares = _reduce(flat, x.shape[0], options.running is None, channels_last, out=buffer)
        terms = _terms(means, squares, flat.shape[2], options, *inputs)
        ctx.options, ctx.channels_last = options, channels_last
        ctx.save_for_backward(x, *inputs, *terms)
        flat_out = _multiply(terms.folded, flat, terms.constant, channels_last, out=buffer)
        del flat, buffer  # of the size of x, copies in channels_last
        # Detached: autograd lets nobody change a function's output in place that is a view.
        out = _unflat(flat_out, x, channels_last).detach()
        statistics = (terms.mean, terms.whitening, terms.scale)
        ctx.mark_non_differentiable(*(t for t in statistics if t is not None))
        return out, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        x, weight, bias, alpha, _, w1, norm_weight, norm_bias, w2, *terms = ctx.saved_tensors
        t = _Terms(*terms)
        n, g, d = t.means.shape
        w1, norm_weight, norm_bias, w2 = (p.to(t.means.dtype) for p in (w1, norm_weight, norm_bias, w2))
        with no_autocast(x):
            channels_last = ctx.channels_last
            flat, dy = (_flat(tensor, d, t.means.dtype, channels_last) for tensor in (x, grad))
            length = flat.shape[2]
            d_matrix = torch.bmm(dy, flat.transpose(1, 2)).view(n, g, d, d)

            # y = M (a z + b)
            d_weight = d_bias = None
            if weight is not None:
                weight, bias = weight.to(dy.dtype).view(g, d), bias.to(dy.dtype).view(g, d)
                d_constant = dy.sum(2).view(n, g, d, 1)
                d_weight = (t.matrix * d_matrix).sum((0, 2))
                d_bias = (t.matrix * d_constant).sum((0, 2))
                d_matrix = torch.addcmul(d_matrix * weight[:, None, :], d_constant, bias[:, None, :])

            d_alpha = None
            if alpha is not None:  # (1 - alpha) I + alpha M
                d_alpha = (d_matrix * (t.equalizer - _eye(t.equalizer))).sum().view(1)
                d_matrix = alpha.to(dy.dtype) * d_matrix

            # M = lambda P + (1 - lambda) diag(gate / s)
            d_whitening = t.lam * d_matrix.sum(0)
            by_reweighting = (d_matrix.diagonal(dim1=2, dim2=3) * t.reweighting.view(n, g, d)).view(n, -1)
            towards_whitening = torch.dot(d_whitening.flatten(), t.whitening.flatten())
            towards_scale = by_reweighting.sum()
            # lambda = sigmoid(theta): lambda' = lambda (1 - lambda)
            d_theta = (1 - t.lam) * towards_whitening - t.lam * towards_scale
            group = ctx.options.process_group
            if group is not None:  # P and s come from all processes and serve all
                d_whitening, towards_scale = _sum_over_processes(group, d_whitening, towards_scale.view(1))

            # gate = sigmoid(W2 relu(LayerNorm(W1 v)))
            d_logits = torch.addcmul(by_reweighting, by_reweighting, t.gate, value=-1)
            d_w2 = d_logits.T @ t.rectified
            d_normed = torch.ops.aten.threshold_backward(d_logits @ w2, t.rectified, 0)
            d_hidden, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
                d_normed, t.hidden, norm_bias.shape, t.hidden_mean, t.hidden_rstd, norm_weight, norm_bias, [True] * 3
            )
            d_w1 = d_hidden.T @ t.variance
            d_variance = d_hidden @ w1

            if ctx.options.running is None:
                # s = sqrt(mean(v))
                twice_count = (n if group is None else t.samples) * (2 * g * d)
                d_variance = d_variance - t.has_variance * towards_scale / (twice_count * t.scale.square())
            d_variance = d_variance.view(n, g, d)
            if weight is not None:  # v = a^2 diag(S) / (L - 1)
                d_variance = weight * d_variance
                d_weight.add_((t.own_variance * d_variance).sum(0), alpha=2)
                d_variance = weight * d_variance
            d_diagonal = (2 / max(length - 1, 1)) * d_variance

            d_x = None
            if ctx.options.running is None:
                # P = f(Sigma_N), Sigma_N = Sigma / trace(Sigma), Sigma = eps + a (covariance of z) a^T
                d_normalized = inverse_sqrt_newton_derivative(t.normalized, d_whitening, ctx.options.num_iterations)
                along = (d_normalized * t.normalized).sum((1, 2), keepdim=True)
                d_sigma = torch.addcmul(d_normalized, along, _eye(d_normalized), value=-1) / t.trace
                if weight is not None:
                    # All processes compute the same here, and their gradients will be added
                    share = 1 if group is None else group.size()
                    d_sigma = d_sigma * weight[:, None, :]
                    d_weight.add_((d_sigma * t.covariance).sum(2), alpha=2 / share)
                    d_sigma = weight[:, :, None] * d_sigma
                if ctx.needs_input_grad[0]:
                    d_sigma = d_sigma * (2 / (n * length if group is None else t.positions))
                    symmetric = d_sigma + d_diagonal.diag_embed()
                    if length == 1:  # x = m; what multiplies x - m may be as large as 1 / eps
                        symmetric = torch.zeros_like(symmetric)
                    d_means = torch.bmm(t.between, d_sigma).transpose(0, 1)  # dm / L
                    constant = d_means[..., None] - symmetric @ t.means[..., None]
                    d_x = _multiply(t.folded.mT, dy, constant, channels_last)
                    symmetric = symmetric.flatten(0, 1)
                    if channels_last:
                        d_x.mT.baddbmm_(flat.mT, symmetric)
                    else:
                        d_x.baddbmm_(symmetric, flat)
            elif ctx.needs_input_grad[0]:
                d_x = _multiply(t.folded.mT, dy, -(d_diagonal * t.means)[..., None], channels_last)
                d_x.addcmul_(d_diagonal.view(-1, d, 1), flat)
            del flat, dy  # of the size of x, copies in channels_last
            if d_x is not None:
                d_x = _unflat(d_x, x, channels_last)
        if weight is not None:
            d_weight, d_bias = d_weight.flatten(), d_bias.flatten()
        return d_x, None, d_weight, d_bias, d_alpha, d_theta, d_w1, d_norm_weight, d_norm_bias, d_w2


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _working_dtype(x: Tensor, options: _Options) -> torch.dtype:
    """Return the dtype to compute in: float32 at least, float64 where many steps are taken.

    In a direction without variance P grows by half with every step, and the effect of a rounding error of Sigma with
    its square: float32 has lost all digits there after twenty steps, and P is not finite after thirty.
    """
    many = options.running is None and options.num_iterations > MAX_FLOAT32_ITERATIONS
    return torch.promote_types(x.dtype, torch.float64 if many else torch.float32)


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """View (N, C, H, W), contiguous or channels_last, as (N, G, d, L)."""
    return x.flatten(2).unflatten(1, (-1, group_size))


def _flat(x: Tensor, group_size: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Return (N, C, H, W) as (N G, d, L) in ``dtype``; a view of input that is contiguous and of that dtype.

    In channels_last it is the transpose, (N G, L, d), that is contiguous: the channels of a group stay side by side.
    """
    if channels_last:
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return _grouped(x, group_size).mT.flatten(0, 1).contiguous().mT
    return x.reshape(-1, group_size, x.shape[2] * x.shape[3]).to(dtype)


def _unflat(flat: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """Return (N G, d, L) in the shape and dtype of ``like``."""
    if not channels_last:
        return flat.view(like.shape).to(like.dtype)
    out = torch.empty_like(like)
    _grouped(out, flat.shape[1]).copy_(flat.unflatten(0, (like.shape[0], -1)))
    return out


def _reduce(
    flat: Tensor, num_samples: int, with_covariance: bool, channels_last: bool, out: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """Return the means over positions, (N, G, d), and the products summed about them.

    The products are S = (x - m)(x - m)^T, (N, G, d, d), or without covariance their diagonals alone, (N, G, d).
    ``out``, of the shape of ``flat``, is overwritten with x - m.
    """
    means = flat.mean(2)
    centered = torch.sub(flat, means[..., None], out=out)
    if with_covariance:
        squares = torch.bmm(centered, centered.transpose(1, 2))
    elif channels_last:  # torch is slow at a norm over positions that are not side by side
        squares = centered.square_().sum(2)
    else:
        squares = torch.linalg.vector_norm(centered, dim=2).square()
    return means.unflatten(0, (num_samples, -1)), squares.unflatten(0, (num_samples, -1))


def _multiply(
    matrix: Tensor, flat: Tensor, constant: Optional[Tensor], channels_last: bool, out: Optional[Tensor] = None
) -> Tensor:
    """Return M x + constant, (N G, d, L), in ``out`` if given; of channels_last input the transpose is contiguous."""
    left, right = matrix.flatten(0, 1), flat
    if constant is not None:
        constant = constant.flatten(0, 1)
    if channels_last:
        left, right, constant = right.mT, left.mT, None if constant is None else constant.mT
    product = torch.bmm(left, right, out=out) if constant is None else torch.baddbmm(constant, left, right, out=out)
    return product.mT if channels_last else product


def _sum_over_processes(group: dist.ProcessGroup, *values: Tensor) -> list[Tensor]:
    """Return the sums of values over the processes of a group, in one exchange."""
    flat = torch.cat([value.flatten() for value in values])
    dist.all_reduce(flat, group=group)
    return [part.view(value.shape) for part, value in zip(flat.split([v.numel() for v in values]), values)]


def _means_over_processes(group: dist.ProcessGroup, *weighted: tuple[Tensor, int]) -> list[tuple[Tensor, Tensor]]:
    """Return each value's mean over the processes, weighted with the integer beside it, and the sum of the weights."""
    means, weights = zip(*weighted)
    *sums, totals = _sum_over_processes(
        group, *(mean * weight for mean, weight in weighted), means[0].new_tensor(weights)
    )
    return [(value / total, total) for value, total in zip(sums, totals.split(1))]
