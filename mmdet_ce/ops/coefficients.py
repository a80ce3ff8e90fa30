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
from .maps import SCATTER_UNIT
from .mixture import MixtureState, mixture, mixture_backward
from .newton import whitening, whitening_backward
from .norm_affine import EvalNorm, Folded, Unfolded, restored
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
    """M, and the statistics of the batch that it was computed with; None in evaluation."""

    matrix: Tensor  # (N, G, d, d), what z is multiplied with
    constant: Optional[Tensor]  # c, (N, G, d), what is added
    mean: Optional[Tensor]  # (G, d, 1), mu of x
    whitening: Optional[Tensor]  # (G, d, d), P_T
    scale: Optional[Tensor]  # (1,), s
    saved: tuple[Optional[Tensor], ...]  # for the backward pass


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
    norm, alpha, parameters = _norm(inputs, options), _alpha(inputs, options), _gate_parameters(inputs, options)
    sample_means, scatter = sample_means.to(options.dtype), scatter.to(options.dtype)
    squares = scatter.diagonal(dim1=2, dim2=3) if training else scatter
    z_variance = squares * (SCATTER_UNIT / max(length - 1, 1))
    variance = norm.variance(z_variance)  # v; of a 1x1 map 0
    gates = gate(variance.flatten(1), parameters)
    batch = newton = None
    if training:
        batch = batch_statistics(sample_means, scatter, length, variance, norm, options.processes, options.map_dtype)
        newton = whitening(norm.covariance(batch.z_covariance), options.eps, options.num_iterations)
        p, scale = newton.whitening, batch.scale
    else:
        # P is copied: a training pass may update the buffer in place before the backward pass of this one
        p, scale = options.running[0].to(options.dtype, copy=True), options.running[1].to(options.dtype)
    mixed = mixture(p, gates.gate, scale, inputs.theta.to(options.dtype), alpha)
    matrix, constant = norm.fold(mixed.matrix)
    saved = sample_means, z_variance, *norm.saved, *gates, *mixed
    if not training:
        return Coefficients(matrix, constant, None, None, None, saved)
    saved = *saved, newton.trace, newton.normalized, *_tensors(batch)
    return Coefficients(matrix, constant, norm.mean(batch.z_mean)[..., None], p, scale, saved)


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
        K, (N, G, d, d), or where it is diagonal its diagonal, (N, G, d), and k, (N, G, d), in dx = M^T dy + K x - k;
        and the gradients of ``inputs``, from the norm's weight on.
    """
    sample_means, z_variance, *saved = saved
    norm, saved = restored(saved, has_weight=inputs.norm_weight is not None)
    gates, saved = _first(saved, GateState)
    mixed, saved = _first(saved, MixtureState)
    training = options.running is None
    d_matrix = d_matrix.to(options.dtype)
    d_constant = None if d_constant is None else d_constant.to(options.dtype)
    d_matrix = norm.fold_backward(mixed.matrix, d_matrix, d_constant)
    d_mixture = mixture_backward(mixed, _alpha(inputs, options), d_matrix, training)
    d_variance, d_parameters = gate_backward(gates, _gate_parameters(inputs, options), d_mixture.log_gate)
    through_covariance = None
    if training:
        trace, normalized, *saved = saved
        batch = _batch(saved, len(sample_means), length)
        # P and s come from all processes and serve all
        d_whitening, d_log_inverse_scale = options.processes.sums(d_mixture.whitening, d_mixture.log_inverse_scale)
        d_variance = scale_backward(batch, d_variance, d_log_inverse_scale)
        d_covariance = whitening_backward(trace, normalized, options.num_iterations, d_whitening)
        # All processes compute the same here, and their gradients will be added
        d_covariance = norm.covariance_backward(batch.z_covariance, d_covariance, 1 / options.processes.size)
        through_covariance = covariance_backward(batch, d_covariance)
    d_variance = norm.variance_backward(z_variance, d_variance.view_as(sample_means))
    slope, offset = _dx(sample_means, length, d_variance, through_covariance)
    return slope, offset, (*norm.gradients(), d_mixture.alpha, d_mixture.theta, *d_parameters)


def _dx(
    sample_means: Tensor, length: int, d_variance: Tensor, through_covariance: Optional[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return K and k in dx = M^T dy + K x - k: what comes through the statistics.

    Through a sample's own variance it is 2 dv / (L - 1) (x - m), through the covariance K (x - mu).

    Args:
        sample_means: m, (N, G, d).
        length: Positions L of a sample.
        d_variance: dv of each sample's own variance, of z, (N, G, d).
        through_covariance: In training K, (G, d, d), and K mu, (G, d).
    """
    factor = 2 / max(length - 1, 1)
    if through_covariance is None:
        slope = torch.zeros_like(d_variance) if length == 1 else d_variance * factor
        return slope, slope * sample_means
    by_covariance, at_mean = through_covariance
    slope = by_covariance.expand(len(sample_means), -1, -1, -1).contiguous()
    if length == 1:  # x = m; K may be as large as 1 / eps, and 16-bit maps would not cancel K x and k
        return torch.zeros_like(slope), at_mean - (slope @ sample_means[..., None])[..., 0]
    slope.diagonal(dim1=2, dim2=3).add_(d_variance, alpha=factor)
    return slope, torch.addcmul(at_mean, d_variance, sample_means, value=factor)


def _norm(inputs: Inputs, options: Options) -> Unfolded:
    """Return the norm in the dtype to compute in."""
    if inputs.norm_running_mean is None:
        return Unfolded()
    return Folded.of(EvalNorm(*inputs[:4], options.norm_eps), options.group_size, options.dtype)


def _alpha(inputs: Inputs, options: Options) -> Optional[Tensor]:
    return None if inputs.alpha is None else inputs.alpha.to(options.dtype)


def _gate_parameters(inputs: Inputs, options: Options) -> GateParameters:
    return GateParameters(*(parameter.to(options.dtype) for parameter in inputs[6:]))


def _first(saved: list[Optional[Tensor]], kind: type) -> tuple[NamedTuple, list[Optional[Tensor]]]:
    """Return the first of the saved tensors as the NamedTuple that they were, and the others."""
    count = len(kind._fields)
    return kind(*saved[:count]), saved[count:]


def _tensors(batch: BatchStatistics) -> tuple[Optional[Tensor], ...]:
    """Return what autograd can keep of the statistics; the counts of one process are numbers and None here."""
    return tuple(t if isinstance(t, Tensor) else None for t in batch)


def _batch(tensors: list[Optional[Tensor]], n: int, length: int) -> BatchStatistics:
    batch = BatchStatistics(*tensors)
    return batch if batch.samples is not None else batch._replace(samples=n, positions=n * length)
