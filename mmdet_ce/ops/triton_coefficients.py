"""The small matrices between the passes over a map as Triton kernels: ``coefficients`` in a few launches.

The same equations as ``coefficients``, two to four stages a kernel. Products are as exact as float32. Nothing reads
from the device, so the host runs ahead. Tensors that only kernels see are parts of one buffer, the large ones first, so
that they are aligned; in evaluation those of the batch are not written.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
from torch import Tensor

from . import triton_coefficient_backward_kernels as backward_kernels
from . import triton_coefficient_kernels as kernels
from .records import Coefficients, Inputs, Options

UNITS = 8  # hidden units of a program
BLOCK = 512  # channels that such a program holds at once
HIDDEN_TILE = 4096  # weights of the group's channels that a program of a group holds at once
MATRIX_WARPS = {16: 4, 32: 4, 64: 8}  # of the programs that iterate on matrices, by group size


def coefficients(sample_means: Tensor, scatter: Tensor, length: int, inputs: Inputs, options: Options) -> Coefficients:
    """Return M and the statistics it comes from; see ``coefficients.coefficients``."""
    (n, g, d), training = sample_means.shape, options.running is None
    c, num_hidden = g * d, len(inputs.ln_weight)
    norm, has_norm, has_alpha = _norm(inputs, options), inputs.norm_running_mean is not None, inputs.alpha is not None
    empty = sample_means.new_empty
    sizes = n * c, c, c * d, c * d, *[n * num_hidden] * 3, n, n, n, g, 2 * g
    parts = empty(sum(sizes)).split(sizes)
    gate, center, covariance, normalized, hidden, *gate_state, trace, sums = parts
    mean, whitening, scale = empty((g, d, 1)) if training else None, empty((g, d, d)), empty((1,))
    matrix, constant = empty((n, g, d, d)), empty((n, g, d)) if has_norm else None
    given_whitening, given_scale = options.running or (whitening, None)
    with torch.cuda.device_of(matrix):
        if training:
            kernels.batch_kernel[(g,)](
                sample_means, scatter, *norm, options.eps, center, mean, covariance, normalized, trace, whitening, sums,
                n, g, length, d, options.num_iterations, has_norm, num_warps=MATRIX_WARPS[d],
            )  # fmt: skip
        kernels.hidden_kernel[(triton.cdiv(num_hidden, UNITS), n)](
            scatter, *norm, inputs.fc1_weight, hidden, c, num_hidden, length,
            d, UNITS, min(BLOCK, triton.next_power_of_2(c)), training, has_norm,
        )  # fmt: skip
        kernels.mixture_kernel[(g, n)](
            hidden, sums, given_whitening, given_scale, *norm, inputs.alpha, inputs.theta, inputs.ln_weight,
            inputs.ln_bias, inputs.fc2_weight, matrix, constant, gate, *gate_state, scale, whitening, n, g, num_hidden,
            d, *_hidden_blocks(g, d, num_hidden), training, has_norm, has_alpha,
        )  # fmt: skip
    return Coefficients(matrix, constant, mean, whitening, scale, (sample_means, scatter, whitening, scale, *parts))


def coefficients_backward(
    saved: tuple[Optional[Tensor], ...],
    length: int,
    d_matrix: Tensor,
    d_constant: Optional[Tensor],
    inputs: Inputs,
    options: Options,
) -> tuple[Tensor, Tensor, tuple[Optional[Tensor], ...]]:
    """Return what dx needs, and the gradients of ``inputs``; see ``coefficients.coefficients_backward``."""
    sample_means, scatter, whitening, scale, gate, center, covariance, normalized, *gate_state, trace, sums = saved
    _, reduced, rectified, ln_unit, ln_mean, ln_rstd = gate_state
    (n, g, d), training = sample_means.shape, options.running is None
    c, num_hidden = g * d, len(inputs.ln_weight)
    norm, has_norm, has_alpha = _norm(inputs, options), inputs.norm_running_mean is not None, inputs.alpha is not None
    empty = sample_means.new_empty
    sizes = n * c, 2 * c, c * d, n * num_hidden, 3 * g
    d_logits, d_affine, d_sigma, d_normed, d_scalars = empty(sum(sizes)).split(sizes)
    k_matrix, k_vector = empty((n, g, d, d)) if training else empty((n, g, d)), empty((n, g, d))
    d_norm = (empty((c,)), empty((c,))) if has_norm else (None, None)
    d_scalar = empty((1,)) if has_alpha else None, empty((1,))
    d_fc1, d_fc2 = empty((num_hidden, c)), empty((c, num_hidden))
    max_groups, _, block = _hidden_blocks(g, d, num_hidden)
    with torch.cuda.device_of(k_vector):
        backward_kernels.mixture_backward_kernel[(g,)](
            d_matrix, d_constant, whitening, scale, gate, normalized, trace, covariance, *norm, inputs.alpha,
            inputs.theta, d_logits, d_affine, d_scalars, d_sigma, n, g, length,
            d, options.num_iterations, training, has_norm, has_alpha, num_warps=MATRIX_WARPS[d],
        )  # fmt: skip
        backward_kernels.hidden_backward_kernel[(triton.cdiv(num_hidden, UNITS), n + 1)](
            d_logits, rectified, inputs.fc2_weight, d_normed, d_fc2, n, c, num_hidden,
            UNITS, min(BLOCK, triton.next_power_of_2(c)),
        )  # fmt: skip
        d_reduced, d_ln_weight, d_ln_bias = torch.ops.aten.native_layer_norm_backward(
            d_normed.view(n, -1), reduced.view(n, -1), [num_hidden], ln_mean.view(n, 1), ln_rstd.view(n, 1),
            inputs.ln_weight.float(), inputs.ln_bias.float(), [True] * 3,
        )  # fmt: skip
        backward_kernels.gate_backward_kernel[(g, n + 1)](
            d_reduced, ln_unit, inputs.fc1_weight, sample_means, scatter, center, d_sigma, d_affine, d_scalars, sums,
            scale, *norm, k_matrix, k_vector, *d_norm, *d_scalar, d_fc1, n, g, num_hidden, length,
            d, max_groups, block, training, has_norm, has_alpha,
        )  # fmt: skip
    if inputs.norm_weight is None:
        d_norm = None, None
    return k_matrix, k_vector, (*d_norm, *d_scalar, d_fc1, d_ln_weight, d_ln_bias, d_fc2)


def _norm(inputs: Inputs, options: Options) -> tuple[Optional[Tensor], Optional[Tensor], Tensor, Tensor, float]:
    """Return the norm's arguments of a kernel; all that is None where there is none."""
    mean, variance, weight, bias = inputs[:4]
    if mean is not None and weight is None:
        weight, bias = torch.ones_like(mean), torch.zeros_like(mean)
    return mean, variance, weight, bias, options.norm_eps


def _hidden_blocks(num_groups: int, d: int, num_hidden: int) -> tuple[int, int, int]:
    """Return the powers of two that all groups fit into, and all hidden units, and the units held at once."""
    units = triton.next_power_of_2(num_hidden)
    return triton.next_power_of_2(num_groups), units, min(HIDDEN_TILE // d, units)
