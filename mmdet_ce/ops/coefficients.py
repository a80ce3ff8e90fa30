"""From the moments of a map to the matrix M that it is multiplied with, and back: the small matrices, stage by stage.

    m, S  --norm-->  moments of x  -->  v, Sigma, s  -->  gate, P_T  -->  M  --norm-->  M a and M b

Each stage has its forward and its backward function side by side; here they are put in order.
``triton_coefficients`` has the same two functions for GPUs.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .batch import batch_scale, batch_scale_backward, batch_statistics, summed
from .gate import gate, gate_backward
from .maps import SCATTER_UNIT
from .newton import eye, whitening, whitening_backward
from .norm_affine import affine, affine_backward, fold, fold_backward, moments_backward
from .precision import matmul
from .records import Coefficients, Inputs, Options, Saved


def coefficients(sample_means: Tensor, scatter: Tensor, length: int, inputs: Inputs, options: Options) -> Coefficients:
    """Return M from the moments of the map z.

    Args:
        sample_means: m, (N, G, d).
        scatter: S, (N, G, d, d), in units of ``SCATTER_UNIT``; in evaluation its diagonal, (N, G, d).
        length: Positions L of a sample.
        inputs: The tensors beside the map.
        options: The arguments.
    """
    training = options.running is None
    inputs = _converted(inputs, options.dtype)
    sample_means, scatter = sample_means.to(options.dtype), scatter.to(options.dtype)
    rstd, a, b = affine(inputs, options.norm_eps, options.group_size)
    squares = scatter.diagonal(dim1=2, dim2=3) if training else scatter
    # length - 1, and 1 for a 1x1 map, whose variance is 0; max() would choose while a trace is made
    z_variance = squares * (SCATTER_UNIT / (length - 1 + 1 // length))
    variance = z_variance if a is None else z_variance * a.square()
    unit, reduced, hidden, hidden_mean, hidden_rstd, rectified, gates = gate(variance.flatten(1), inputs)
    mean = samples = positions = z_mean = z_covariance = lacks_variance = trace = normalized = None
    if training:
        x_means = sample_means if a is None else torch.addcmul(b, a, sample_means)
        samples, positions, z_mean, z_covariance, mean_variance, rounding = batch_statistics(
            sample_means, scatter, length, x_means, variance, options
        )
        lacks_variance, scale = batch_scale(mean_variance, rounding, options.map_dtype)
        mean = z_mean if a is None else torch.addcmul(b, a, z_mean)
        covariance = z_covariance if a is None else a[:, :, None] * z_covariance * a[:, None, :]
        trace, normalized, p = whitening(covariance, options.eps, options.num_iterations)
    else:
        # P is copied: a training pass may update the buffer in place before the backward pass of this one
        p, scale = options.running[0].to(options.dtype, copy=True), options.running[1].to(options.dtype)
    lambda_, reweighting, ce_matrix, matrix = mixture(p, gates, scale, inputs)
    folded, constant = (matrix, None) if a is None else fold(matrix, a, b)
    saved = Saved(
        sample_means, z_variance, rstd, a, b,
        unit, reduced, hidden, hidden_mean, hidden_rstd, rectified, gates,
        lambda_, p, reweighting, ce_matrix, matrix,
        samples, positions, z_mean, z_covariance, lacks_variance, scale if training else None, trace, normalized,
    )  # fmt: skip
    statistics = (mean[..., None], p, scale) if training else (None, None, None)
    return Coefficients(folded, constant, *statistics, saved)


def coefficients_backward(
    saved: tuple[Optional[Tensor], ...],
    length: int,
    d_matrix: Tensor,
    d_constant: Optional[Tensor],
    inputs: Inputs,
    options: Options,
) -> tuple[Tensor, Tensor, tuple[Optional[Tensor], ...]]:
    """Return K and k in dx = M^T dy + K x - k, and the gradients of ``inputs``, from the norm's weight on.

    Args:
        saved: Of the forward pass, as are ``length``, ``inputs`` and ``options``.
        length: Positions L of a sample.
        d_matrix: The gradient of what z was multiplied with, (N, G, d, d).
        d_constant: The gradient of what was added, (N, G, d), or None.
        inputs: The tensors beside the map.
        options: The arguments.
    """
    saved, inputs, group = Saved(*saved), _converted(inputs, options.dtype), options.process_group
    d_matrix, d_covariance, d_norm = d_matrix.to(options.dtype), None, (None, None)
    if saved.a is not None:
        d_matrix, d_a, d_b = fold_backward(saved, d_matrix, d_constant.to(options.dtype))
    d_alpha, d_theta, d_log_gate, d_log_inverse_scale, d_whitening = mixture_backward(saved, inputs, d_matrix)
    d_variance, d_gate_inputs = gate_backward(saved, inputs, d_log_gate)
    if options.running is None:
        # P and s come from all processes and serve all
        d_whitening, d_log_inverse_scale = summed(group, d_whitening, d_log_inverse_scale)
        d_variance = batch_scale_backward(saved, d_variance, d_log_inverse_scale)
        d_covariance = whitening_backward(saved, options.num_iterations, d_whitening)
    d_variance = d_variance.view_as(saved.sample_means)
    if saved.a is not None:
        # All processes compute the same of the covariance, and their gradients will be added
        share = 1 if group is None else 1 / group.size()
        d_a, d_variance, d_covariance = moments_backward(saved, d_a, d_variance, d_covariance, share)
        d_norm = affine_backward(saved, inputs, d_a, d_b)
    k_matrix, k_vector = through_statistics(saved, length, d_variance, d_covariance)
    return k_matrix, k_vector, (*d_norm, d_alpha, d_theta, *d_gate_inputs)


def mixture(whitening: Tensor, gates: Tensor, scale: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return lambda, gate / s, M of CE alone and M, which differ where CE has grown in by the share alpha.

    M = lambda P + (1 - lambda) diag(gate / s): both branches of CE as one matrix for each sample and group.
    """
    lambda_, identity = torch.sigmoid(inputs.theta), eye(whitening)
    reweighting = (gates / scale).view(-1, *whitening.shape[:2])
    ce_matrix = torch.lerp(reweighting[..., None] * identity, whitening, lambda_)
    matrix = ce_matrix if inputs.alpha is None else torch.lerp(identity, ce_matrix, inputs.alpha)
    return lambda_, reweighting, ce_matrix, matrix


def mixture_backward(saved: Saved, inputs: Inputs, d_matrix: Tensor) -> tuple[Optional[Tensor], ...]:
    """Return the gradients of alpha, theta, log(gate), (N, C), and in training of log(1 / s) and P, (G, d, d)."""
    d_alpha = None
    if inputs.alpha is not None:
        d_alpha = (d_matrix * (saved.ce_matrix - eye(d_matrix))).sum().view(1)
        d_matrix = inputs.alpha * d_matrix
    summed_matrix = d_matrix.sum(0)
    by_gate = d_matrix.diagonal(dim1=2, dim2=3) * saved.reweighting
    towards_whitening = torch.dot(summed_matrix.flatten(), saved.whitening.flatten())
    towards_reweighting = by_gate.sum().view(1)
    d_theta = torch.ops.aten.sigmoid_backward(towards_whitening - towards_reweighting, saved.lambda_)
    d_log_gate = _times_rest(by_gate.flatten(1), saved.lambda_)
    if saved.normalized is None:
        return d_alpha, d_theta, d_log_gate, None, None
    return d_alpha, d_theta, d_log_gate, _times_rest(towards_reweighting, saved.lambda_), saved.lambda_ * summed_matrix


def _times_rest(tensor: Tensor, lambda_: Tensor) -> Tensor:
    """Return (1 - lambda) times a tensor."""
    return torch.addcmul(tensor, tensor, lambda_, value=-1)


def through_statistics(
    saved: Saved, length: int, d_variance: Tensor, d_covariance: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return K, (N, G, d, d), or its diagonal, (N, G, d), in evaluation, and k, (N, G, d), in dx = M^T dy + K x - k.

    Through a sample's own variance comes 2 dv / (L - 1) (x - m), through the covariance 2 dSigma / (N L) (x - mu).

    Args:
        saved: Of the forward pass.
        length: Positions L of a sample.
        d_variance: dv, (N, G, d), of z.
        d_covariance: dSigma, (G, d, d), symmetric, of z; None in evaluation.
    """
    means, factor = saved.sample_means, 2 / max(length - 1, 1)
    if d_covariance is None:
        k_matrix = torch.zeros_like(d_variance) if length == 1 else d_variance * factor
        return k_matrix, k_matrix * means
    by_covariance = d_covariance * (2 / (len(means) * length if saved.positions is None else saved.positions))
    at_mean = matmul(by_covariance, saved.z_mean[..., None])[..., 0]
    k_matrix = by_covariance.expand(len(means), -1, -1, -1).contiguous()
    if length == 1:  # x = m; K may be as large as 1 / eps, and 16-bit maps would not cancel K x and k
        return torch.zeros_like(k_matrix), at_mean - matmul(k_matrix, means[..., None])[..., 0]
    k_matrix.diagonal(dim1=2, dim2=3).add_(d_variance, alpha=factor)
    return k_matrix, torch.addcmul(at_mean, d_variance, means, value=factor)


def _converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs(*(None if tensor is None else tensor.to(dtype) for tensor in inputs))
