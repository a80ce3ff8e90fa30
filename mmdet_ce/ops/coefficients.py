"""From the moments of the map h to the matrix that it is multiplied with, and back: the small matrices, stage by stage.

    m, S  ->  moments of z  --norm-->  [V | b]  ->  moments of x  ->  v, Sigma, s  ->  gate, P_T  ->  [M V | M b]

h is the norm's input z, or the input of the 1x1 convolution before the norm, z = W h. The norm's output is
x = a z + b = V h + b. Each stage has its forward and its backward function side by side; here they are put in order.
"""

from __future__ import annotations

from functools import reduce
from types import ModuleType
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from . import covariances, variances
from .batch import Batch, batch_scale, batch_scale_backward, merged, merged_backward, summed
from .gate import gate, gate_backward
from .mixture import MixtureGradients, mix, mix_backward
from .newton import whiten, whiten_backward
from .norm import affine, affine_backward, affine_matrix, move_running_values
from .precision import add_matmul, matmul
from .records import (
    BatchMoments,
    Coefficients,
    Gradients,
    Moments,
    Parameters,
    ProjectedGradients,
    Saved,
    Settings,
    Statistics,
)


def coefficients(moments: Moments, length: int, parameters: Parameters, settings: Settings) -> Coefficients:
    """Return what the map h is multiplied with, from its moments; its samples have L positions each."""
    p = converted(parameters, settings.dtype)
    moments_of = _moments_of(moments.means, moments.covariances)
    batch = moments_of.of_batch(moments, length) if settings.trains or settings.norm_trains else None
    z = None
    if settings.norm_trains:
        z = moments_of.of_z(batch, p.conv_weight)
        move_running_values(settings.norm, z, count=len(moments.means) * length)
    norm = affine(z, p, settings)
    matrix = affine_matrix(norm, p.conv_weight, moments.means, settings.group_size)  # [V | b], (G, d, J + 1)
    x = moments_of.of_x(moments, matrix[..., :-1], norm.a)
    gates = gate(x.variance, p)
    if settings.trains:
        statistics, kept = _statistics(batch, x.variance, matrix, length, settings)
        whitening = statistics.whitening
        scale = statistics.scale
    else:
        statistics, kept = Statistics(), {}
        whitening = settings.running_whitening.to(settings.dtype)
        scale = settings.running_scale.to(settings.dtype)
    mixture = mix(matrix, whitening, gates.gate, scale, p)
    saved = Saved(
        means=moments.means,
        affine=matrix,
        projected=x.projected,
        norm_mean=norm.mean,
        rstd=norm.rstd,
        a=norm.a,
        variance=x.variance,
        whitening=whitening,
        batch_mean=None if batch is None else batch.mean,
        batch_covariance=None if batch is None else batch.covariance,
        batch_shifts=None if batch is None else batch.shifts,
        **gates._asdict(),
        **mixture._asdict(),
        **kept,
    )
    return Coefficients(matrix=mixture.matrix, statistics=statistics, saved=saved)


def _statistics(
    batch: BatchMoments, variance: Tensor, matrix: Tensor, length: int, settings: Settings
) -> tuple[Statistics, dict[str, Optional[Tensor]]]:
    """Return the statistics of x over the batch, of this process or of all, and fields of ``Saved``."""
    x = covariances.covariance_of_x(batch, matrix[..., :-1])
    own = Batch(
        mean=_mean_of_x(batch.mean, matrix),
        covariance=x.variance,
        mean_variance=variance.mean().view(1),
    )
    whole = merged(own, len(variance), length, settings.process_group)
    scale = batch_scale(whole, settings.dtype)
    whitening = whiten(whole.covariance, settings.eps, settings.num_iterations)
    statistics = Statistics(
        mean=whole.mean[..., None],
        whitening=whitening.whitening,
        scale=scale.scale,
        is_finite=scale.is_finite,
    )
    kept = dict(
        batch_projected=x.projected,
        mean_variance=scale.mean_variance,
        has_variance=scale.has_variance,
        trace=whitening.trace,
        normalized=whitening.normalized,
        sample_share=whole.sample_share,
        position_share=whole.position_share,
        shift=whole.shift,
    )
    return statistics, kept


def _mean_of_x(mean: Tensor, matrix: Tensor) -> Tensor:
    """Return the mean of x = V h + b, (G, d), from that of h, (B, J), and [V | b]."""
    columns = mean[..., None].expand(len(matrix), -1, -1)  # (G, J, 1)
    return add_matmul(matrix[..., -1:], matrix[..., :-1], columns, beta=1, alpha=1)[..., 0]


def coefficients_backward(
    d_mixed: Tensor, length: int, saved: Saved, parameters: Parameters, settings: Settings
) -> Gradients:
    """Return the gradients from that of [M V | M b], (N, G, d, J + 1).

    What comes through the moments of h is K and k in dh = K (h - m) + k: through the covariance of a sample comes
    2 / (L - 1) times its gradient, through that of the batch 2 / (N L) times it.
    """
    p = converted(parameters, settings.dtype)
    moments_of = _moments_of(saved.means, saved.projected)
    num_blocks = saved.means.shape[1]
    matrix = saved.affine[..., :-1]  # V
    mixture = mix_backward(d_mixed, saved, p, settings.trains)
    gates = gate_backward(mixture.log_gate, saved, p)
    d_variance = gates.variance
    d_matrix = mixture.affine[..., :-1]
    d_b = mixture.affine[..., -1]
    through_batch = []
    if settings.trains:
        trained = _statistics_backward(mixture, d_variance, saved, settings)
        d_variance = trained.variance
        through_batch.append(covariances.covariance_of_x_backward(trained.covariance, trained.mean, matrix, num_blocks))
        d_matrix = add_matmul(d_matrix, trained.covariance, saved.batch_projected, beta=1, alpha=2)
        if trained.mean is not None:
            d_matrix = torch.addcmul(d_matrix, trained.mean[..., None], saved.batch_mean[:, None])
            d_b = d_b + trained.mean
    samples = moments_of.of_x_backward(d_variance, matrix, saved.projected, saved.a, num_blocks)
    d_matrix = torch.add(d_matrix, samples.matrix, alpha=2)
    norm = affine_backward(d_matrix, d_b, saved, p, settings)
    d_conv_weight = norm.conv_weight
    if settings.norm_trains:
        through = moments_of.of_z_backward(
            norm.mean, norm.variance, saved.batch_mean, saved.batch_covariance, p.conv_weight
        )
        through_batch.append(through)
        if d_conv_weight is not None:
            # Not by alpha: torch.compile of torch 2.13 drops it beside a product of two matrices
            d_conv_weight = d_conv_weight + 2 * through.matrix
            d_conv_weight = torch.addcmul(d_conv_weight, norm.mean[:, None], saved.batch_mean)
    k_matrix, k_vector = _through_moments(samples.covariances, through_batch, length, saved)
    return Gradients(
        k_matrix=k_matrix,
        k_vector=k_vector,
        parameters=Parameters(
            theta=mixture.theta,
            alpha=mixture.alpha,
            conv_weight=None if d_conv_weight is None else d_conv_weight[..., None, None],
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            fc1_weight=gates.fc1_weight,
            ln_weight=gates.ln_weight,
            ln_bias=gates.ln_bias,
            fc2_weight=gates.fc2_weight,
        ),
    )


def _through_moments(
    d_covariances: Tensor, through_batch: list[ProjectedGradients], length: int, saved: Saved
) -> tuple[Tensor, Optional[Tensor]]:
    """Return K, and k or None for 0, from what comes through the covariances of the samples and through the batch."""
    k_matrix = d_covariances * (2 / (length - 1) if length > 1 else 0.0)  # one position has no variance
    if not through_batch:
        return k_matrix, None
    num_positions = max(saved.means.shape[0] * length, 1)
    d_covariance = reduce(torch.add, (through.covariances for through in through_batch))
    k_matrix = torch.add(k_matrix, d_covariance, alpha=2 / num_positions)
    moments_of = _moments_of(saved.means, saved.projected)
    k_vector = moments_of.at_means(d_covariance, saved.batch_shifts, 2 / num_positions)
    for through in through_batch:
        if through.mean is not None:
            k_vector = torch.add(k_vector, through.mean, alpha=1 / num_positions)
    return k_matrix, k_vector


class _StatisticsGradients(NamedTuple):
    """The gradients of this process's own moments of x."""

    variance: Tensor  # (N, C), what was given and what comes through s
    covariance: Tensor  # (G, d, d), symmetric
    mean: Optional[Tensor]  # (G, d); None for 0


def _statistics_backward(
    mixture: MixtureGradients, d_variance: Tensor, saved: Saved, settings: Settings
) -> _StatisticsGradients:
    """Return the gradients of the moments of x from those of P, s and v. P and s serve all processes."""
    d_whitening = matmul(mixture.decorrelation, saved.affine.mT)
    d_whitening, d_log_inverse_scale = summed(settings.process_group, d_whitening, mixture.log_inverse_scale)
    d_covariance = whiten_backward(d_whitening, settings.num_iterations, saved)
    d_covariance, d_mean = merged_backward(d_covariance, saved)
    return _StatisticsGradients(
        variance=batch_scale_backward(d_variance, d_log_inverse_scale, saved),
        covariance=d_covariance,
        mean=d_mean,
    )


def _moments_of(means: Tensor, covariances_or_projected: Tensor) -> ModuleType:
    """Return the module for covariances, or for variances, which have the shape of the means."""
    return variances if covariances_or_projected.shape == means.shape else covariances


def converted(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """Return the parameters in the dtype that is computed in, a convolution's weight as W, (C, J)."""
    if any(tensor is not None and tensor.dtype != dtype for tensor in parameters):
        parameters = Parameters._make(None if tensor is None else tensor.to(dtype) for tensor in parameters)
    if parameters.conv_weight is None:
        return parameters
    return parameters._replace(conv_weight=parameters.conv_weight.flatten(1))
