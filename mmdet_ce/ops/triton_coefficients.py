"""The small matrices between the passes over a map as Triton kernels: ``coefficients`` in a few launches.

The same equations as ``coefficients``, two to four stages a kernel. Products are as exact as
float32. Nothing reads from the device, so the host runs ahead.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from . import triton_coefficient_backward_kernels as backward_kernels
from . import triton_coefficient_kernels as kernels
from .coefficients import Coefficients, Inputs, Options
from .triton_launch import carve, room_for, start

UNITS = 8  # hidden units of a program
BLOCK = 512  # channels that such a program holds at once
HIDDEN_TILE = 4096  # weights of the group's channels that a program of a group holds at once
MATRIX_WARPS = {16: 4, 32: 4, 64: 8}  # of the programs that iterate on matrices, by group size


def coefficients(sample_means: Tensor, scatter: Tensor, length: int, inputs: Inputs, options: Options) -> Coefficients:
    """Return M and the statistics it comes from; see ``coefficients.coefficients``."""
    (n, g, d), training = sample_means.shape, options.running is None
    c, num_hidden = g * d, len(inputs.ln_weight)
    norm, norm_flags = _norm(inputs, options)
    empty = sample_means.new_empty
    shapes = _saved_shapes(n, g, d, num_hidden, training)
    buffer = empty(room_for(*shapes))
    hidden, gate, center, covariance, normalized, trace, sums = carve(buffer, *shapes)
    whitening, mean = empty((g, d, d)), None
    if training:
        mean = empty((g, d, 1))
        start(
            kernels.batch_kernel, (g,),
            (
                sample_means, scatter, *norm, options.eps, center, mean, covariance, normalized, trace, whitening, sums,
                n, g, length,
            ), (d, options.num_iterations, *norm_flags), MATRIX_WARPS[d],
        )  # fmt: skip
    start(
        kernels.hidden_kernel, (_blocks(num_hidden, UNITS), n),
        (scatter, *norm, inputs.fc1_weight, hidden, c, num_hidden, length),
        (d, UNITS, min(BLOCK, _power_of_2(c)), training, *norm_flags),
    )  # fmt: skip
    matrix, scale = empty((n, g, d, d)), empty((1,))
    constant = empty((n, g, d)) if norm_flags[0] else None
    given_whitening, given_scale = options.running or (whitening, None)
    start(
        kernels.mixture_kernel, (g, n),
        (
            hidden, sums, given_whitening, given_scale, *norm, inputs.alpha, inputs.theta, inputs.ln_weight,
            inputs.ln_bias, inputs.fc2_weight, matrix, constant, gate, scale, whitening, n, g, num_hidden,
        ), (
            d, _power_of_2(g), _power_of_2(num_hidden), _hidden_block(num_hidden, d), training,
             *norm_flags, inputs.alpha is not None,
        ),
    )  # fmt: skip
    return Coefficients(matrix, constant, mean, whitening, scale, (sample_means, scatter, whitening, scale, buffer))


def coefficients_backward(
    saved: tuple[Optional[Tensor], ...],
    length: int,
    d_matrix: Tensor,
    d_constant: Optional[Tensor],
    inputs: Inputs,
    options: Options,
) -> tuple[Tensor, Tensor, tuple[Optional[Tensor], ...]]:
    """Return what dx needs, and the gradients of ``inputs``; see ``coefficients.coefficients_backward``."""
    sample_means, scatter, whitening, scale, buffer = saved
    (n, g, d), training = sample_means.shape, options.running is None
    c, num_hidden, max_hidden = g * d, len(inputs.ln_weight), _power_of_2(len(inputs.ln_weight))
    hidden, gate, center, covariance, normalized, trace, sums = carve(
        buffer, *_saved_shapes(n, g, d, num_hidden, training)
    )
    norm, norm_flags = _norm(inputs, options)
    has_alpha = inputs.alpha is not None
    empty = sample_means.new_empty
    shapes = (n, c), (g, 2, d), (g, 3), (n, num_hidden), (g, d, d) if training else ()
    d_logits, d_affine, d_scalars, d_normed, d_sigma = carve(empty(room_for(*shapes)), *shapes)
    start(
        backward_kernels.mixture_backward_kernel, (g,),
        (
            d_matrix, d_constant, whitening, scale, gate, normalized, trace, covariance, *norm, inputs.alpha,
            inputs.theta, d_logits, d_affine, d_scalars, d_sigma, n, g, length,
        ), (d, options.num_iterations, training, *norm_flags, has_alpha), MATRIX_WARPS[d],
    )  # fmt: skip
    d_fc2 = empty((c, num_hidden))
    start(
        backward_kernels.hidden_backward_kernel, (_blocks(num_hidden, UNITS), n + 1),
        (d_logits, hidden, inputs.ln_weight, inputs.ln_bias, inputs.fc2_weight, d_normed, d_fc2, n, c, num_hidden),
        (UNITS, min(BLOCK, _power_of_2(c)), max_hidden),
    )  # fmt: skip
    slope, offset = empty((n, g, d, d)) if training else empty((n, g, d)), empty((n, g, d))
    d_norm = (empty((c,)), empty((c,))) if norm_flags[1] else (None, None)
    d_scalar = empty((1,)) if has_alpha else None, empty((1,))
    d_gate = empty((num_hidden, c)), empty((num_hidden,)), empty((num_hidden,))
    start(
        backward_kernels.gate_backward_kernel, (g, n + 1),
        (
            d_normed, hidden, inputs.ln_weight, inputs.fc1_weight, sample_means, scatter, center, d_sigma, d_affine,
            d_scalars, sums, scale, *norm, slope, offset, *d_norm, *d_scalar, *d_gate, n, g, num_hidden, length,
        ), (
            d, _power_of_2(g), max_hidden, _hidden_block(num_hidden, d), training, *norm_flags,
            has_alpha,
        ),
    )  # fmt: skip
    return slope, offset, (*d_norm, *d_scalar, *d_gate, d_fc2)


def _saved_shapes(n: int, g: int, d: int, num_hidden: int, training: bool) -> list[tuple[int, ...]]:
    """Return the shapes of what the backward pass needs of the forward pass: of the gate, and of the batch.

    The gate's W1 v and the gate; of the batch the mean and covariance of z, Sigma_N, trace(Sigma), and what s is
    computed from.
    """
    batch = [(g, d), (g, d, d), (g, d, d), (g,), (g, 2)]
    return [(n, num_hidden), (n, g * d), *(batch if training else [()] * len(batch))]


def _norm(inputs: Inputs, options: Options) -> tuple[tuple, tuple[bool, bool]]:
    """Return the norm's arguments of a kernel, and whether it is there and whether it has weights."""
    mean, variance, weight, bias = inputs[:4]
    return (mean, variance, weight, bias, options.norm_eps), (mean is not None, weight is not None)


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _hidden_block(num_hidden: int, d: int) -> int:
    return min(HIDDEN_TILE // d, _power_of_2(num_hidden))


def _power_of_2(count: int) -> int:
    """Return the least power of two that is not below ``count``."""
    return 1 << (count - 1).bit_length()
