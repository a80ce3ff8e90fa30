"""The statistics of the batch from those of its samples: their equations and their gradients."""

from __future__ import annotations

import torch
from utils import assert_agree

from mmdet_ce.ops.batch import batch_statistics, covariance_backward, scale_backward
from mmdet_ce.ops.norm_affine import Unfolded
from mmdet_ce.ops.processes import OneProcess

LENGTH = 15


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return means, scatters and unbiased variances of the samples of (N, G, d, L)."""
    means = x.mean(3)
    centered = x - means[..., None]
    return means, centered @ centered.mT, x.var(3)


def statistics_of(x: torch.Tensor):
    means, scatter, variance = moments(x)
    return batch_statistics(means, scatter, LENGTH, variance, Unfolded(), OneProcess())


def test_the_equations():
    x = torch.randn(3, 2, 4, LENGTH, dtype=torch.float64) + 2
    statistics = statistics_of(x)
    for g in range(2):
        positions = x[:, g].transpose(0, 1).flatten(1)
        assert_agree(statistics.mean[g], positions.mean(1), 1e-13)
        assert_agree(statistics.covariance[g], torch.cov(positions, correction=0), 1e-12)
    assert_agree(statistics.scale, x.var(3).mean().sqrt().view(1), 1e-13)


def test_a_batch_without_variance_has_scale_one():
    statistics = statistics_of(torch.ones(3, 2, 4, LENGTH, dtype=torch.float64))
    assert statistics.scale.item() == 1 and not statistics.has_variance.item()


def test_backward_is_the_gradient():
    """With respect to the map: dx = S (x - m) + dm / L, and through every variance alike."""
    x = torch.randn(3, 2, 4, LENGTH, dtype=torch.float64, requires_grad=True)
    statistics = statistics_of(x)
    grad = torch.randn(2, 4, 4, dtype=torch.float64)
    grad = grad + grad.mT
    (expected,) = torch.autograd.grad(statistics.covariance, x, grad, retain_graph=True)
    symmetric, d_means = covariance_backward(statistics, grad)
    centered = x - x.mean(3, keepdim=True)
    assert_agree((symmetric @ centered + d_means[..., None]).detach(), expected, 1e-12)
    (expected,) = torch.autograd.grad(statistics.scale, x)
    # with respect to log(1 / s): -s times that to s
    lost = scale_backward(statistics, 8, -statistics.scale)
    assert_agree((-lost * 2 / (LENGTH - 1) * centered).detach(), expected, 1e-12)
