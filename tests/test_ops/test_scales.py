"""Inputs of any magnitude: float64's values for deviations from 1e-15 to 1e8."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import channel_equilibrium_reference
from torch import nn
from utils import randomize, reference

from mmdet_ce import ChannelEquilibrium

SHAPE = (3, 32, 6, 6)
LEAST_GRADIENT = 1e-25  # of float32's digits, none are left of the smallest gradients


def make(scale: float, folded: bool = False):
    """Return a norm that keeps the scale, or None, a CE layer, a map with means, and a gradient."""
    norm = randomize(nn.BatchNorm2d(SHAPE[1])).eval()
    nn.init.zeros_(norm.bias)
    norm.running_mean.mul_(scale)
    ce = randomize(ChannelEquilibrium(SHAPE[1]), seed=1)
    x = torch.randn(SHAPE) * (0.5 + torch.rand(1, SHAPE[1], 1, 1)) + torch.randn(1, SHAPE[1], 1, 1)
    return norm if folded else None, ce, scale * x, torch.randn(SHAPE)


def run(function, x, grad, *modules) -> dict[str, torch.Tensor]:
    """Return output and gradients by name."""
    x = x.clone().requires_grad_()
    out = function(x)
    out.backward(grad.to(out.dtype))
    gradients = {name: p.grad for m in modules if m is not None for name, p in m.named_parameters()}
    return dict(out=out.detach(), x=x.grad, **gradients)


def double(*modules):
    return [copy.deepcopy(m).double() if m is not None else nn.Identity() for m in modules]


def agree(actual: dict, expected: dict) -> None:
    for name, value in expected.items():
        limit = 2e-5 * max(value.abs().max().item(), LEAST_GRADIENT)
        error = (actual[name].double() - value).abs().max().item()
        assert error <= limit, f'{name}: largest difference {error:.3g}, allowed {limit:.3g}'


@pytest.mark.parametrize('scale', [1e-15, 1e-12, 1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('folded', [True, False])
def test_agrees_with_float64(scale, training, folded):
    norm, ce, x, grad = make(scale, folded)
    ce.train(training)
    norm64, ce64 = double(norm, ce)
    expected = run(lambda x: reference(ce64, norm64(x)).out, x.double(), grad, norm64, ce64)
    agree(run(lambda x: ce(x, norm=norm), x, grad, norm, ce), expected)


@pytest.mark.parametrize('scale', [1e-30, 1e-20, 1e-17])
def test_a_smaller_deviation_counts_as_none(scale):
    """Then s = 1, as for a constant map, where 1 / s and its gradient would leave float32."""
    _, ce, x, grad = make(scale)
    (ce64,) = double(ce)
    whitening = reference(ce64, x.double()).whitening.detach()
    parameters = ce64.theta, *ce64.ir.gate_parameters
    constants = dict(group_size=16, running_whitening=whitening, running_scale=torch.ones(1, dtype=torch.float64))
    expected = run(lambda x: channel_equilibrium_reference(x, *parameters, **constants).out, x.double(), grad, ce64)
    agree(run(ce, x, grad, ce), expected)
