"""The BatchNorm before CE, x = a z + b, in evaluation and in training, with the convolution z = W h before it."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from .precision import dot_rows
from .records import NormInput, Parameters, Saved, Settings


class Affine(NamedTuple):
    """A BatchNorm as an affine map; without a norm each field is None."""

    mean: Optional[Tensor] = None  # (C,), that it subtracts
    rstd: Optional[Tensor] = None  # (C,), its reciprocal deviation
    a: Optional[Tensor] = None  # (C,)
    b: Optional[Tensor] = None  # (C,)


def affine(batch: Optional[NormInput], p: Parameters, settings: Settings) -> Affine:
    """Return the affine map of the norm, with the statistics of the batch if it trains."""
    norm = settings.norm
    if norm is None:
        return Affine()
    mean = norm.running_mean.to(settings.dtype) if batch is None else batch.mean
    variance = norm.running_var.to(settings.dtype) if batch is None else batch.variance
    rstd = torch.rsqrt(variance + norm.eps)
    a = rstd if p.norm_weight is None else p.norm_weight * rstd
    b = -mean * a if p.norm_bias is None else torch.addcmul(p.norm_bias, mean, a, value=-1)
    return Affine(mean=mean, rstd=rstd, a=a, b=b)


def affine_matrix(norm: Affine, conv_weight: Optional[Tensor], means: Tensor, group_size: int) -> Tensor:
    """Return [V | b], (G, d, J + 1), x = V h + b. Without a convolution, J = d and V is diagonal."""
    if norm.a is None:
        num_groups = means.shape[1]
        identity = torch.eye(group_size, group_size + 1, dtype=means.dtype, device=means.device)
        return identity.expand(num_groups, -1, -1)
    if conv_weight is None:
        matrix = torch.diag_embed(norm.a.view(-1, group_size))
    else:
        matrix = (norm.a[:, None] * conv_weight).view(-1, group_size, conv_weight.shape[1])
    return torch.cat([matrix, norm.b.view(-1, group_size, 1)], 2)


def move_running_values(norm: nn.BatchNorm2d, batch: NormInput, count: int) -> None:
    """Move the running values of a norm that trains as torch does; ``count`` are the values of each channel."""
    if norm.running_mean is None or not norm.track_running_stats:
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # the mean of all batches
        momentum = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    unbiased = batch.variance * (count / (count - 1))
    for running, value in ((norm.running_mean, batch.mean), (norm.running_var, unbiased)):
        running.lerp_(value.to(running.dtype), momentum)


class NormGradients(NamedTuple):
    """What comes back through norm and convolution; None where there is no such part."""

    conv_weight: Optional[Tensor] = None  # (C, J)
    weight: Optional[Tensor] = None  # (C,)
    bias: Optional[Tensor] = None  # (C,)
    mean: Optional[Tensor] = None  # (C,), of z over the batch, if the norm trains
    variance: Optional[Tensor] = None  # (C,), likewise


def affine_backward(d_matrix: Tensor, d_b: Tensor, saved: Saved, p: Parameters, settings: Settings) -> NormGradients:
    """Return the gradients from those of V, (G, d, J), and b, (G, d); b = bias - mean a."""
    if settings.norm is None:
        return NormGradients()
    d_b = d_b.flatten()
    if p.conv_weight is None:
        d_weight = None
        d_a = d_matrix.diagonal(dim1=1, dim2=2).flatten()
    else:
        d_matrix = d_matrix.flatten(0, 1)
        d_weight = saved.a[:, None] * d_matrix
        d_a = dot_rows(d_matrix[None], p.conv_weight)[0]
    d_a = torch.addcmul(d_a, saved.norm_mean, d_b, value=-1)
    gradients = NormGradients(
        conv_weight=d_weight,
        weight=None if p.norm_weight is None else d_a * saved.rstd,
        bias=None if p.norm_bias is None else d_b,
    )
    if not settings.norm_trains:
        return gradients
    return gradients._replace(mean=-saved.a * d_b, variance=-0.5 * saved.a * saved.rstd.square() * d_a)
