"""The statistics of the batch from those of its samples: their equations and their gradients."""

from __future__ import annotations

import pytest
import torch
from utils import assert_agree

from mmdet_ce.ops.batch import batch_scale, batch_scale_backward, batch_statistics
from mmdet_ce.ops.coefficients import through_statistics
from mmdet_ce.ops.maps import SCATTER_UNIT
from mmdet_ce.ops.records import Options, Saved

LENGTH = 15


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return means, scatters in their unit and unbiased variances of the samples of (N, G, d, L)."""
    means = x.mean(3)
    centered = x - means[..., None]
    return means, centered @ centered.mT / SCATTER_UNIT, x.var(3)


def statistics_of(x: torch.Tensor) -> Saved:
    """Return mean and covariance of the batch, and s."""
    means, scatter, variance = moments(x)
    options = Options(4, 3, 1e-5, 0.0, None, None, x.dtype, x.dtype)
    _, _, mean, covariance, mean_variance, rounding = batch_statistics(means, scatter, LENGTH, means, variance, options)
    lacks_variance, scale = batch_scale(mean_variance, rounding, x.dtype)
    return Saved(sample_means=means, z_mean=mean, z_covariance=covariance, lacks_variance=lacks_variance, scale=scale)


def test_the_equations():
    x = torch.randn(3, 2, 4, LENGTH, dtype=torch.float64) + 2
    statistics = statistics_of(x)
    for g in range(2):
        positions = x[:, g].transpose(0, 1).flatten(1)
        assert_agree(statistics.z_mean[g], positions.mean(1), 1e-13)
        assert_agree(statistics.z_covariance[g], torch.cov(positions, correction=0), 1e-12)
    assert_agree(statistics.scale, x.var(3).mean().sqrt().view(1), 1e-13)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_batch_without_variance_has_scale_one(dtype):
    tiny = torch.finfo(dtype).tiny ** 0.5
    for x in (torch.ones(3, 2, 4, LENGTH), tiny * torch.randn(3, 2, 4, LENGTH, dtype=dtype)):
        statistics = statistics_of(x.to(dtype))
        assert statistics.scale.item() == 1 and statistics.lacks_variance.item()
        d_variance = torch.randn(3, 8, dtype=dtype)
        assert torch.equal(batch_scale_backward(statistics, d_variance, torch.ones(1, dtype=dtype)), d_variance)


def test_backward_is_the_gradient():
    """With respect to the map: dx = K x - k, through the covariance and through every variance."""
    x = torch.randn(3, 2, 4, LENGTH, dtype=torch.float64, requires_grad=True)
    statistics = statistics_of(x)
    grad = torch.randn(2, 4, 4, dtype=torch.float64)
    grad = grad + grad.mT
    one = torch.ones(1, dtype=torch.float64)
    expected = torch.autograd.grad([statistics.z_covariance, statistics.scale.log()], x, [grad, one])
    statistics = Saved(*(None if t is None else t.detach() for t in statistics))
    d_variance = batch_scale_backward(statistics, torch.zeros(3, 8, dtype=torch.float64), -one)
    k_matrix, k_vector = through_statistics(statistics, LENGTH, d_variance.view(3, 2, 4), grad)
    assert_agree(k_matrix @ x.detach() - k_vector[..., None], expected[0], 1e-12)
