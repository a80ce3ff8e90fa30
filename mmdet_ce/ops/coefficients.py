"""From the moments of the map h to the matrix that it is multiplied with, and back: the small matrices, stage by stage.

    m, S  ->  moments of z  --norm-->  [V | b]  ->  moments of x  ->  v, Sigma, s  ->  gate, P_T  ->  [M V | M b]

h is the norm's input z, or the input of the 1x1 convolution before the norm, z = W h. The norm's output is
x = a z + b = V h + b. Each stage has its forward and its backward function side by side; here they are put in order.
"""

from __future__ import annotations

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
from .precision import matmul
from .records import BatchMoments, Coefficients, Gradients, Moments, Parameters, Saved, Settings, Statistics


def coefficients(moments: Moments, length: int, parameters: Parameters, settings: Settings) -> Coefficients:
    """Return what the map h is multiplied with, from its moments; its samples have L positions each."""
    p = _converted(parameters, settings.dtype)
    moments_of = _moments_of(moments.means, moments.covariances)
    batch = moments_of.of_batch(moments, length) if settings.trains or settings.norm_trains else None
    z = None
    if settings.norm_trains:
        z = moments_of.of_z(batch, p.conv_weight)
        move_running_values(settings.norm, z, count=len(moments.means) * length)
    norm = affine(z, p, settings)
    matrix = affine_matrix(norm, p.conv_weight, moments.means, settings.group_size)  # [V | b], (G, d, J + 1)
    x = moments_of.of_x(moments, matrix[..., :-1])
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
        mean=(matmul(matrix[..., :-1], batch.mean[..., None]) + matrix[..., -1:])[..., 0],
        covariance=x.variance,
        mean_variance=(variance.sum() / max(variance.numel(), 1)).view(1),
    )
    whole = merged(own, len(variance), length, settings.process_group)
    scale = batch_scale(whole, settings.dtype)
    whitening = whiten(whole.covariance, settings.eps, settings.num_iterations)
    statistics = Statistics(
        mean=whole.mean[..., None],
        whitening=whitening.whitening,
        scale=scale.scale,
        is_usable=scale.is_usable,
    )
    kept = dict(
        batch_projected=x.projected,
        mean_variance=scale.mean_variance,
        is_usable=scale.is_usable,
        trace=whitening.trace,
        normalized=whitening.normalized,
        sample_share=whole.sample_share,
        position_share=whole.position_share,
        shift=whole.shift,
    )
    return statistics, kept


def coefficients_backward(
    d_matrix: Tensor, length: int, saved: Saved, parameters: Parameters, settings: Settings
) -> Gradients:
    """Return the gradients from that of [M V | M b], (N, G, d, J + 1).

    What comes through the moments of h is given as K and k in dh = K (h - m) + k: through the covariance of a sample
    comes 2 / (L - 1) times its gradient, through that of the batch 2 / (N L) times it.
    """
    p = _converted(parameters, settings.dtype)
    moments_of = _moments_of(saved.means, saved.projected)
    num_samples, num_blocks, _ = saved.means.shape
    num_positions = max(num_samples * length, 1)
    matrix = saved.affine[..., :-1]  # V
    mixture = mix_backward(d_matrix, saved, p)
    gates = gate_backward(mixture.log_gate, saved, p)
    d_affine = mixture.affine  # (G, d, J + 1); what comes through the moments is added to it
    d_variance = gates.variance
    k_batch = []
    d_mean = []  # gradients of the mean of h over the batch, (B, J)
    if settings.trains:
        trained = _statistics_backward(mixture, d_variance, saved, settings)
        d_variance = trained.variance
        weights = trained.covariance * (2 / num_positions)
        through = covariances.covariance_of_x_backward(weights, matrix, saved.batch_projected, num_blocks)
        d_affine[..., :-1].add_(through.matrix, alpha=num_positions)
        k_batch.append(through.k_matrix)
        if trained.mean is not None:
            d_affine[..., :-1].addcmul_(trained.mean[..., None], saved.batch_mean[:, None])
            d_affine[..., -1].add_(trained.mean)
            d_mean.append(covariances.mean_backward(trained.mean, matrix, num_blocks))
    # A sample of one position has no variance
    weights = d_variance * (2 / (length - 1) if length > 1 else 0.0)
    through = moments_of.of_x_backward(weights, matrix, saved.projected, num_blocks)
    d_affine[..., :-1].add_(through.matrix, alpha=length - 1)
    k_matrix = through.k_matrix
    norm = affine_backward(d_affine, saved, p, settings)
    d_weight = norm.conv_weight
    if settings.norm_trains:
        batch = BatchMoments(mean=saved.batch_mean, covariance=saved.batch_covariance)
        weights = norm.variance * (2 / num_positions)
        through = moments_of.of_z_backward(norm.mean, weights, batch, p.conv_weight)
        k_batch.append(through.k_matrix)
        d_mean.append(through.mean)
        if d_weight is not None:
            d_weight = d_weight.add(through.matrix, alpha=num_positions).addcmul_(norm.mean[:, None], batch.mean)
    k_vector = None
    if k_batch:
        k_batch = sum(k_batch)
        k_vector = moments_of.at_means(k_batch, saved.means - saved.batch_mean)
        if d_mean:
            k_vector = k_vector + sum(d_mean) / num_positions
        k_matrix = k_matrix + k_batch
    return Gradients(
        k_matrix=k_matrix,
        k_vector=k_vector,
        parameters=Parameters(
            theta=mixture.theta,
            alpha=mixture.alpha,
            conv_weight=d_weight,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            fc1_weight=gates.fc1_weight,
            ln_weight=gates.ln_weight,
            ln_bias=gates.ln_bias,
            fc2_weight=gates.fc2_weight,
        ),
    )


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
    batch = merged_backward(d_covariance, saved)
    return _StatisticsGradients(
        variance=batch_scale_backward(d_variance, d_log_inverse_scale, saved),
        covariance=batch.covariance,
        mean=batch.mean,
    )


def _moments_of(means: Tensor, covariances_or_projected: Tensor) -> ModuleType:
    """Return the module for covariances, or for variances, which have the shape of the means."""
    return variances if covariances_or_projected.shape == means.shape else covariances


def _converted(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """Return the parameters in the dtype that is computed in, a convolution's weight as W, (C, J)."""
    converted = Parameters._make(None if tensor is None else tensor.to(dtype) for tensor in parameters)
    if converted.conv_weight is None:
        return converted
    return converted._replace(conv_weight=converted.conv_weight.flatten(1))
