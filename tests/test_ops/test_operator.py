"""The one-matrix form: what it takes, its dtypes, and its numerics in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from utils import assert_agree, randomize

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import channel_equilibrium


def norm_and_ce(dtype=torch.float64, **kwargs):
    norm = randomize(nn.BatchNorm2d(32)).to(dtype).eval()
    return norm, randomize(ChannelEquilibrium(32, **kwargs), seed=1).to(dtype)


@pytest.mark.parametrize('given', ['running_whitening', 'running_scale'])
def test_one_running_value_alone_is_refused(given):
    ce = ChannelEquilibrium(32)
    running = dict(running_whitening=ce.bd.running_whitening, running_scale=ce.ir.running_scale)
    with pytest.raises(ValueError, match='needs both running_whitening and running_scale'):
        channel_equilibrium(
            torch.randn(2, 32, 4, 4),
            ce.theta,
            *ce.ir.gate_parameters,
            group_size=16,
            **{given: running[given]},
        )


def run(function, x, *modules):
    """Return the output and the gradients of the input and of all parameters."""
    for module in modules:
        module.zero_grad()
    x = x.clone().requires_grad_()
    out = function(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out, x.grad, *(p.grad for m in modules for p in m.parameters())


def test_gradient_of_theta_keeps_its_digits_near_lambda_one():
    """lambda (1 - lambda) times a difference: 1 - lambda has to stand before the difference."""
    _, ce = norm_and_ce(torch.float32)
    x = torch.randn(2, 32, 16, 16)
    with torch.no_grad():
        ce.theta.fill_(14)
    ce64 = copy.deepcopy(ce).double()
    grad, expected = (run(module, x.to(module.theta.dtype), module)[2] for module in (ce, ce64))
    assert_agree(grad, expected, 1e-2)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_output_may_be_changed_in_place(memory_format):
    """A residual block adds its shortcut in place."""
    _, ce = norm_and_ce()
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64).to(memory_format=memory_format)
    a = run(lambda x: ce.eval()(x) + x, x, ce)
    b = run(lambda x: ce(x).add_(x).relu_(), x, ce)
    assert_agree(b[0], a[0].relu(), 1e-12)


@pytest.mark.parametrize('training', [True, False])
def test_a_large_mean_costs_no_digits(training):
    """Sums of squares about zero would lose four of float32's seven digits here."""
    ce = randomize(ChannelEquilibrium(32)).train(training)
    double = copy.deepcopy(ce).double()
    x = torch.randn(3, 32, 8, 8) + 100 * torch.randn(1, 32, 1, 1)
    expected, out = run(double, x.double(), double), run(ce, x, ce)
    for a, b in zip(out, expected):
        assert_agree(a, b, 1e-4)


def ill_conditioned(shape):
    """Two channel groups whose covariances have condition number 1e6."""
    q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    root = q * torch.logspace(0, -3, 16, dtype=torch.float64) @ q.T
    x = torch.randn(shape, dtype=torch.float64).unflatten(1, (2, 16))
    return torch.einsum('ij,ngjhw->ngihw', root, x).flatten(1, 2)


def rank_deficient(shape):
    mix = torch.randn(shape[1], 3, dtype=torch.float64)
    return torch.einsum('ij,njhw->nihw', mix, torch.randn(shape[0], 3, *shape[2:], dtype=torch.float64))


def equal_channels(shape):
    return torch.randn(shape[0], 1, *shape[2:], dtype=torch.float64).repeat(1, shape[1], 1, 1)


def dead_channels(shape):
    return torch.randn(shape, dtype=torch.float64) * (torch.arange(shape[1]) % 3 > 0).view(-1, 1, 1)


def channels_of_all_scales(shape):
    return torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -6, shape[1], dtype=torch.float64).view(-1, 1, 1)


@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(
    'make', [ill_conditioned, rank_deficient, equal_channels, dead_channels, channels_of_all_scales]
)
def test_adversarial_statistics(make, scale):
    """In float32: finite forward and backward for T up to 40, and float64's values up to T = 20."""
    x = (scale * make((3, 32, 6, 6))).float()
    for num_iterations in (1, 2, 3, 8, 9, 20, 40):
        ce = randomize(ChannelEquilibrium(32, num_iterations=num_iterations))
        results = run(ce, x, ce)
        assert all(torch.isfinite(result).all() for result in (*results, *ce.buffers())), num_iterations
        if num_iterations <= 20:
            double = randomize(ChannelEquilibrium(32, num_iterations=num_iterations)).double()
            expected = run(double, x.double(), double)
            assert_agree(results[0], expected[0], 1e-5, f'out, T = {num_iterations}')
            assert_agree(results[1], expected[1], 1e-4, f'grad_x, T = {num_iterations}')


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('folded', [True, False])
def test_nothing_comes_from_the_host(training, folded):
    """On the meta device an operation with a CPU tensor is an error."""
    norm = torch.nn.BatchNorm2d(32).eval().to('meta')
    ce = ChannelEquilibrium(32, identity_start=True).train(training).to('meta')
    x = torch.zeros(2, 32, 8, 8, device='meta', requires_grad=True)
    ce(x, norm=norm if folded else None, shortcut=x * 2, relu=True).sum().backward()
    assert x.grad.is_meta and all(p.grad.is_meta for p in ce.parameters())
