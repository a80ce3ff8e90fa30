"""From the moments of a map to the matrix M that it is multiplied with, and back: the small matrices, stage by stage.

    m, S  --norm-->  moments of x  -->  v, Sigma, s  -->  gate, P_T  -->  M  --norm-->  M a and M b

Each stage has its forward and its backward function in a module of its own; here they are put in order.
``triton_coefficients`` has the same two functions for GPUs.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .batch import BatchStatistics, batch_statistics, covariance_backward, scale_backward
from .gate import GateParameters, GateState, gate, gate_backward
from .mixture import MixtureState, mixture, mixture_backward
from .newton import whitening, whitening_backward
from .norm_affine import EvalNorm, Folded, Unfolded
from .processes import OneProcess


class Inputs(NamedTuple):
    """The tensors that M is computed from beside the map; None where there is none."""

    norm_running_mean: Optional[Tensor]  # (C,), of the folded norm
    norm_running_var: Optional[Tensor]  # (C,)
    norm_weight: Optional[Tensor]  # (C,)
    norm_bias: Optional[Tensor]  # (C,)
    alpha: Optional[Tensor]  # (1,)
    theta: Tensor  # (1,)
    fc1_weight: Tensor  # (C / r, C)
    ln_weight: Tensor  # (C / r,)
    ln_bias: Tensor  # (C / r,)
    fc2_weight: Tensor  # (C, C / r)


class Options(NamedTuple):
    """Arguments that no gradient is asked of."""

    group_size: int
    num_iterations: int
    eps: float
    norm_eps: float
    running: Optional[tuple[Tensor, Tensor]]  # P_T and s in evaluation, None in training
    processes: OneProcess  # over which the batch extends, in training
    map_dtype: torch.dtype  # of the passes over the map
    dtype: torch.dtype  # of the small matrices


class Coefficients(NamedTuple):
    """M, and the statistics that it was computed with."""

    matrix: Tensor  # (N, G, d, d), what z is multiplied with
    constant: Optional[Tensor]  # (N, G, d), what is added
    mean: Optional[Tensor]  # (G, d, 1), mu; None in evaluation
    whitening: Tensor  # (G, d, d)
    scale: Tensor  # (1,)
    saved: tuple[Optional[Tensor], ...]  # for the backward pass


def coefficients(sample_means: Tensor, scatter: Tensor, length: int, inputs: Inputs, options: Options) -> Coefficients:
    """Return M from the moments of the map z.

    Args:
        sample_means: m, (N, G, d).
        scatter: S, (N, G, d, d); in evaluation its diagonal, (N, G, d).
        length: Positions L of a sample.
        inputs: The tensors beside the map.
        options: The arguments.
    """
    training = options.running is None
    norm, alpha, theta, parameters = _converted(inputs, options)
    sample_means, scatter = sample_means.to(options.dtype), scatter.to(options.dtype)
    own_variance = (scatter.diagonal(dim1=2, dim2=3) if training else scatter) / max(length - 1, 1)
    variance = norm.variance(own_variance)  # v; of a 1x1 map 0
    gates = gate(variance.flatten(1), parameters)
    statistics = trace = normalized = None
    if training:
        statistics = batch_statistics(sample_means, scatter, length, variance, norm, options.processes)
        covariance = norm.covariance(statistics.covariance)
        trace, normalized, p = whitening(covariance, options.eps, options.num_iterations)
        scale = statistics.scale
    else:
        # Copied: a training pass may update the buffers in place before the backward pass of this one
        p, scale = (t.to(options.dtype, copy=True) for t in options.running)
    mixed = mixture(p, gates.gate, scale, theta, alpha)
    matrix, constant = norm.fold(mixed.matrix)
    saved = sample_means, own_variance, trace, normalized, *gates, *mixed, *(_tensors(statistics))
    mean = statistics.mean[..., None] if training else None
    return Coefficients(matrix, constant, mean, p, scale, saved)


def coefficients_backward(
    saved: tuple[Optional[Tensor], ...],
    length: int,
    d_matrix: Tensor,
    d_constant: Optional[Tensor],
    inputs: Inputs,
    options: Options,
) -> tuple[Tensor, Tensor, tuple[Optional[Tensor], ...]]:
    """Return what dx needs, and the gradients of the tensors beside the map.

    Args:
        saved: Of the forward pass.
        length: Positions L of a sample.
        d_matrix: The gradient of what z was multiplied with, (N, G, d, d).
        d_constant: The gradient of what was added, (N, G, d), or None.
        inputs: Those of the forward pass.
        options: Those of the forward pass.

    Returns:
        S, (N, G, d, d), or where it is diagonal its diagonal, (N, G, d); the constant of dx, (N, G, d); and the
        gradients of ``inputs``, from the norm's weight on.
    """
    sample_means, own_variance, trace, normalized, *rest = saved
    gates, mixed = GateState(*rest[:6]), MixtureState(*rest[6:11])
    norm, alpha, _, parameters = _converted(inputs, options)
    d_matrix = d_matrix.to(options.dtype)
    d_constant = None if d_constant is None else d_constant.to(options.dtype)
    mixture_gradients = mixture_backward(mixed, alpha, norm.fold_backward(mixed.matrix, d_matrix, d_constant))
    d_variance, d_parameters = gate_backward(gates, parameters, mixture_gradients.log_gate)
    covariance_part = None
    if options.running is None:
        statistics = _statistics(rest[11:], len(sample_means), length)
        # P and s come from all processes and serve all
        d_whitening, by_scale = options.processes.sums(mixture_gradients.whitening, mixture_gradients.log_inverse_scale)
        d_variance = d_variance - scale_backward(statistics, d_variance.shape[1], by_scale)
        d_covariance = whitening_backward(trace, normalized, options.num_iterations, d_whitening)
        # All processes compute the same here, and their gradients will be added
        d_covariance = norm.covariance_backward(statistics.covariance, d_covariance, 1 / options.processes.size)
        covariance_part = covariance_backward(statistics, d_covariance)
    d_variance = norm.variance_backward(own_variance, d_variance.view_as(sample_means))
    symmetric, constant = _dx(sample_means, length, d_variance, covariance_part)
    return (
        symmetric,
        constant,
        (
            *norm.gradients(),
            mixture_gradients.alpha,
            mixture_gradients.theta,
            *d_parameters,
        ),
    )


def _dx(
    sample_means: Tensor, length: int, d_variance: Tensor, covariance_part: Optional[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return S and the constant in dx = M^T dy + S x + constant: S (x - m) + dm / L through the statistics.

    Args:
        sample_means: m, (N, G, d).
        length: Positions L of a sample.
        d_variance: The gradient of each sample's own variance, (N, G, d).
        covariance_part: In training what comes through the covariance, (G, d, d), and dm / L, (N, G, d).
    """
    diagonal = (2 / max(length - 1, 1)) * d_variance
    if length == 1:  # x = m; what multiplies x - m may be as large as 1 / eps, and 16-bit maps would not cancel it
        diagonal = torch.zeros_like(diagonal)
    if covariance_part is None:
        return diagonal, -(diagonal * sample_means)
    by_covariance, by_means = covariance_part
    symmetric = by_covariance + diagonal.diag_embed()
    if length == 1:
        symmetric = torch.zeros_like(symmetric)
    return symmetric, by_means - (symmetric @ sample_means[..., None])[..., 0]


def _converted(inputs: Inputs, options: Options) -> tuple[Unfolded, Optional[Tensor], Tensor, GateParameters]:
    """Return the norm, alpha, theta and the gate's parameters, in the dtype to compute in."""
    mean, var, weight, bias, alpha, theta, *parameters = inputs
    norm = Unfolded()
    if mean is not None:
        norm = Folded(EvalNorm(mean, var, weight, bias, options.norm_eps), options.group_size, options.dtype)
    alpha = None if alpha is None else alpha.to(options.dtype)
    return norm, alpha, theta.to(options.dtype), GateParameters(*(p.to(options.dtype) for p in parameters))


def _tensors(statistics: Optional[BatchStatistics]) -> tuple[Optional[Tensor], ...]:
    """Return what autograd can keep of the statistics; the counts of one process are numbers and None here."""
    if statistics is None:
        return ()
    return tuple(t if isinstance(t, Tensor) else None for t in statistics)


def _statistics(tensors: list[Optional[Tensor]], n: int, length: int) -> BatchStatistics:
    statistics = BatchStatistics(*tensors)
    return statistics if statistics.samples is not None else statistics._replace(samples=n, positions=n * length)
