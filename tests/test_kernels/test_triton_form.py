"""The Triton form against the float64 oracle, on a GPU or, without one, in Triton's interpreter (make test-kernels)."""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch
from torch import nn
from utils import assert_agree, needs, randomize, reference

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import dispatch as kernels

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
RUNS = importlib.util.find_spec('triton') and (DEVICE == 'cuda' or os.environ.get('TRITON_INTERPRET') == '1')
pytestmark = [
    pytest.mark.kernels,
    needs('the Triton form on a GPU'),
    pytest.mark.skipif(not RUNS, reason='needs Triton and a GPU, or its interpreter: make test-kernels'),
]
# Of the largest magnitude: of the statistics and parameters, of the maps. A GPU multiplies 16-bit maps in TF32.
TOLERANCES = {torch.float32: (5e-5, 2e-5), torch.bfloat16: (2e-3, 8e-3), torch.float16: (2e-3, 2e-3)}


@pytest.fixture(autouse=True)
def triton_form(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, 'triton')
    kernels._triton_on.cache_clear()
    yield
    kernels._triton_on.cache_clear()


def make(channels: int, d: int, samples: int, size: tuple[int, int], dtype: torch.dtype, channels_last: bool):
    """Return a norm, a CE layer, a map with means, its shortcut and a gradient."""
    norm = randomize(nn.BatchNorm2d(channels)).eval()
    ce = randomize(ChannelEquilibrium(channels, num_channels=d), seed=1)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, shortcut, grad = (torch.randn(samples, channels, *size) for _ in range(3))
    x = x * torch.rand(1, channels, 1, 1) + torch.randn(1, channels, 1, 1)
    tensors = [t.to(dtype).to(memory_format=memory_format) for t in (x, shortcut, grad)]
    return norm, ce, *tensors


def run(norm, ce, x, shortcut, grad, folded: bool, tail: bool):
    """Return output and gradients by name, of CE on ``DEVICE``."""
    norm, ce = copy.deepcopy(norm).to(DEVICE), copy.deepcopy(ce).to(DEVICE)
    x, shortcut = (t.detach().to(DEVICE).requires_grad_() for t in (x, shortcut))
    assert kernels.choose(x, ce.group_size, ce.bd.num_iterations, True) != kernels.TORCH
    out = ce(x, norm if folded else None, shortcut if tail else None, relu=tail)
    out.backward(grad.to(DEVICE))
    results = dict(out=out, x=x.grad, shortcut=shortcut.grad if tail else None)
    for name, parameter in (*ce.named_parameters(), *(norm.named_parameters('norm') if folded else ())):
        results[name] = parameter.grad
    results.update(dict(ce.named_buffers('buffers')))
    return {name: t.detach().cpu() for name, t in results.items() if t is not None}


def oracle(norm, ce, x, shortcut, grad, folded: bool, tail: bool, passed: torch.Tensor):
    """Return the same by the oracle in float64; where the ReLU passes is taken over, since rounding may decide it."""
    norm, ce = copy.deepcopy(norm).double(), copy.deepcopy(ce).double()
    x, shortcut = (t.detach().double().requires_grad_() for t in (x, shortcut))
    out, mean, whitening, scale = reference(ce, norm(x) if folded else x)
    if tail:
        out = (out + shortcut) * passed
    out.backward(grad.double())
    if ce.training:
        ce._update(mean.detach(), whitening.detach(), scale.detach())
    results = dict(out=out, x=x.grad, shortcut=shortcut.grad if tail else None)
    for name, parameter in (*ce.named_parameters(), *(norm.named_parameters('norm') if folded else ())):
        results[name] = parameter.grad
    results.update(dict(ce.named_buffers('buffers')))
    return {name: t.detach() for name, t in results.items() if t is not None}


def compare(case, dtype, folded: bool, tail: bool, slack: float = 1) -> None:
    actual = run(*case, folded, tail)
    expected = oracle(*case, folded, tail, actual['out'] > 0)
    small, large = TOLERANCES[dtype]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_agree(actual[name], value, slack * (large if name in ('out', 'x', 'shortcut') else small), name)
    assert actual['out'].dtype == actual['x'].dtype == dtype
    assert actual['out'].stride() == case[2].stride()


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('folded', [True, False])
@pytest.mark.parametrize(
    ('channels', 'd', 'samples', 'size', 'channels_last', 'tail'),
    [
        (32, 16, 2, (9, 7), False, True),  # ragged
        (32, 16, 2, (9, 7), True, True),
        (64, 64, 2, (5, 11), False, True),  # a stem
        (64, 64, 1, (8, 8), True, False),
        (64, 32, 3, (17, 33), False, False),  # more than one stretch of positions
        (48, 16, 2, (1, 1), False, True),  # nothing but means
    ],
)
def test_agrees_with_the_oracle(channels, d, samples, size, channels_last, tail, folded, training, dtype):
    case = make(channels, d, samples, size, dtype, channels_last)
    case[1].train(training)
    compare(case, dtype, folded, tail)


@pytest.mark.parametrize('training', [True, False])
def test_alpha(training):
    case = make(32, 16, 2, (9, 7), torch.float32, False)
    identity = randomize(ChannelEquilibrium(32, identity_start=True), seed=2).train(training)
    compare((case[0], identity, *case[2:]), torch.float32, True, True)


@pytest.mark.parametrize('num_iterations', [1, 2, 8])
def test_iterations(num_iterations):
    case = make(32, 16, 2, (9, 7), torch.float32, False)
    ce = randomize(ChannelEquilibrium(32, num_iterations=num_iterations), seed=2).train()
    compare((case[0], ce, *case[2:]), torch.float32, True, True)


def test_a_large_mean_costs_no_digits():
    """Sums of squares about zero would lose four of float32's seven digits here."""
    norm, ce, x, *rest = make(32, 16, 2, (9, 7), torch.float32, False)
    compare((norm, ce.train(), x + 100 * torch.randn(1, 32, 1, 1), *rest), torch.float32, False, False, slack=10)


@pytest.mark.parametrize('scale', [1e-12, 1e10, 1e18])
@pytest.mark.parametrize('training', [True, False])
def test_any_magnitude(scale, training):
    norm, ce, x, shortcut, grad = make(32, 16, 2, (9, 7), torch.float32, False)
    compare((norm, ce.train(training), scale * x, scale * shortcut, grad), torch.float32, False, True, slack=5)


@pytest.mark.parametrize('training', [True, False])
def test_finite_where_squares_are_not_float32s(training):
    norm, ce, x, *rest = make(32, 16, 2, (9, 7), torch.float32, False)
    for scale in (1e-30, 1e-20):
        results = run(norm, ce.train(training), scale * x, *rest, False, True)
        assert all(torch.isfinite(t).all() for t in results.values()), scale


def test_deterministic():
    case = make(64, 64, 2, (33, 17), torch.float32, False)
    first, second = (run(case[0], case[1].train(), *case[2:], True, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_statistics_without_variance_are_one():
    ce = ChannelEquilibrium(32).to(DEVICE).train()
    x = torch.zeros(2, 32, 4, 4, device=DEVICE, requires_grad=True)
    out = ce(x)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()
    assert ce.ir.running_scale.item() == 1.0


def test_many_steps_other_sizes_and_types_stay_with_torch():
    x = torch.randn(2, 24, 4, 4, device=DEVICE)
    assert kernels.choose(x, 8, 3, True) == kernels.TORCH
    assert kernels.choose(x, 24, 3, True) == kernels.TORCH
    x = torch.randn(2, 32, 4, 4, device=DEVICE)
    assert kernels.choose(x, 16, 9, True) == kernels.TORCH
    assert kernels.choose(x.double(), 16, 3, True) == kernels.TORCH
    assert kernels.choose(x, 16, 3, True) != kernels.TORCH
