"""The statistics of the batch from those of its samples: their equations and their gradients."""

from __future__ import annotations

import pytest
import torch
from utils import assert_agree

from mmdet_ce.ops.batch import batch_statistics, covariance_backward, scale_backward
from mmdet_ce.ops.maps import SCATTER_UNIT
from mmdet_ce.ops.norm_affine import Unfolded
from mmdet_ce.ops.processes import OneProcess

LENGTH = 15


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return means, scatters in their unit and unbiased variances of the samples of (N, G, d, L)."""
    means = x.mean(3)
    centered = x - means[..., None]
    return means, centered @ centered.mT / SCATTER_UNIT, x.var(3)


def statistics_of(x: torch.Tensor):
    means, scatter, variance = moments(x)
    return batch_statistics(means, scatter, LENGTH, variance, Unfolded(), OneProcess(), x.dtype)


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
        assert torch.equal(scale_backward(statistics, d_variance, torch.ones(1, dtype=dtype)), d_variance)


def test_backward_is_the_gradient():
    """With respect to the map: dx = K (x - mu), and through every variance alike."""
    x = torch.randn(3, 2, 4, LENGTH, dtype=torch.float64, requires_grad=True)
    statistics = statistics_of(x)
    grad = torch.randn(2, 4, 4, dtype=torch.float64)
    grad = grad + grad.mT
    (expected,) = torch.autograd.grad(statistics.z_covariance, x, grad, retain_graph=True)
    slope, offset = covariance_backward(statistics, grad)
    assert_agree((slope @ x - offset[..., None]).detach(), expected, 1e-12)
    centered = x - x.mean(3, keepdim=True)
    (expected,) = torch.autograd.grad(statistics.scale, x)
    # with respect to log(1 / s): -s times that to s
    gained = scale_backward(statistics, torch.zeros(3, 8, dtype=torch.float64), -statistics.scale)
    assert_agree((gained.view(3, 2, 4, 1) * 2 / (LENGTH - 1) * centered).detach(), expected, 1e-12)
