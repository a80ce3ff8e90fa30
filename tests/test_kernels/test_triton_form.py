"""The Triton form against the float64 oracle, on a GPU or, without one, in Triton's interpreter (make test-kernels)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from utils import assert_agree, needs, randomize, reference

from mmdet_ce import ChannelEquilibrium

pytest_plugins = ('interpreter',)
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
pytestmark = [pytest.mark.kernels, needs('the Triton form on a GPU'), pytest.mark.usefixtures('triton_form')]
# Of the largest magnitude: of the statistics and parameters, of the maps.
TOLERANCES = {torch.float32: (5e-5, 2e-5), torch.bfloat16: (2e-3, 8e-3), torch.float16: (2e-3, 2e-3)}


def make(channels: int, d: int, samples: int, size: tuple[int, int], dtype: torch.dtype, channels_last=False, mean=1):
    """Return a norm, a CE layer, a map, its shortcut and a gradient; means are so many deviations of a channel."""
    norm = randomize(nn.BatchNorm2d(channels)).eval()
    ce = randomize(ChannelEquilibrium(channels, num_channels=d), seed=1)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, shortcut, grad = (torch.randn(samples, channels, *size) for _ in range(3))
    deviations, signs = torch.rand(1, channels, 1, 1), torch.randn(1, channels, 1, 1)
    x = deviations * x + mean * signs
    tensors = [t.to(dtype).to(memory_format=memory_format) for t in (x, shortcut, grad)]
    return norm, ce, *tensors


def run(norm, ce, x, shortcut, grad, folded: bool, tail: bool, passed=None) -> dict[str, torch.Tensor]:
    """Return output, gradients and running values by name.

    They are the float64 oracle's if it is told where the ReLU passes, since there rounding may decide.
    """
    to = dict(device=DEVICE) if passed is None else dict(dtype=torch.float64)
    norm, ce = copy.deepcopy(norm).to(**to), copy.deepcopy(ce).to(**to)
    x, shortcut = (t.detach().to(**to).requires_grad_() for t in (x, shortcut))
    if passed is None:
        out = ce(x, norm if folded else None, shortcut if tail else None, relu=tail)
    else:
        out, *statistics = reference(ce, norm(x) if folded else x)
        out = (out + shortcut) * passed if tail else out
        if ce.training:
            ce._update(*(t.detach() for t in statistics))
    out.backward(grad.to(**to))
    parameters = (*ce.named_parameters(), *(norm.named_parameters('norm') if folded else ()))
    results = dict(out=out, x=x.grad, shortcut=shortcut.grad, **{name: p.grad for name, p in parameters})
    results.update(dict(ce.named_buffers('buffers')))
    return {name: t.detach().cpu() for name, t in results.items() if t is not None}


def compare(case, dtype, folded: bool, tail: bool, slack: float = 1) -> None:
    actual = run(*case, folded, tail)
    expected = run(*case, folded, tail, actual['out'] > 0)
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
    ('channels', 'd', 'samples', 'size', 'channels_last', 'tail', 'mean'),
    [
        (32, 16, 2, (9, 7), False, True, 1),  # ragged
        (32, 16, 2, (9, 7), True, True, 1),
        (64, 64, 2, (5, 11), False, True, 1),  # a stem
        (64, 64, 1, (8, 8), True, False, 1),
        (64, 32, 3, (17, 33), False, False, 1),  # more than one stretch of positions
        (48, 16, 2, (1, 1), False, True, 1),  # nothing but means
        (32, 16, 2, (9, 8), False, True, 10),  # means of ten deviations
    ],
)
def test_agrees_with_the_oracle(tf32, channels, d, samples, size, channels_last, tail, mean, folded, training, dtype):
    case = make(channels, d, samples, size, dtype, channels_last, mean)
    case[1].train(training)
    compare(case, dtype, folded, tail)


@pytest.mark.parametrize(('dtype', 'limit'), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
def test_a_mean_costs_the_output_nothing(tf32, dtype, limit):
    """The error of y beside its deviation, behind a norm that knows the means and deviations of its map."""
    errors = []
    for mean in (0, 10, 30):
        norm, ce, _, shortcut, grad = make(32, 16, 2, (24, 24), dtype)
        x = (torch.randn(2, 32, 24, 24) + mean * torch.randn(1, 32, 1, 1).sign()).to(dtype)
        norm.running_mean, norm.running_var = x.float().mean((0, 2, 3)), x.float().var((0, 2, 3))
        norm.bias.data.zero_()
        case = norm, ce.eval(), x, shortcut, grad, True, False
        actual, exact = run(*case)['out'].double(), run(*case, True)['out']
        errors.append((actual - exact).square().mean().sqrt() / exact.std())
    assert errors[0] <= limit and max(errors) <= 1.3 * errors[0] + 1e-5, errors


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    ('affine', 'kwargs'),
    [(False, {}), (True, dict(identity_start=True)), (True, dict(num_iterations=1)), (True, dict(num_iterations=8))],
)
def test_options(training, affine, kwargs):
    case = make(32, 16, 2, (9, 7), torch.float32)
    norm = randomize(nn.BatchNorm2d(32, affine=affine)).eval()
    ce = randomize(ChannelEquilibrium(32, **kwargs), seed=2).train(training)
    compare((norm, ce, *case[2:]), torch.float32, True, True)


@pytest.mark.parametrize('scale', [1e-12, 1e10, 1e18])
@pytest.mark.parametrize('training', [True, False])
def test_any_magnitude(scale, training):
    norm, ce, x, shortcut, grad = make(32, 16, 2, (9, 7), torch.float32)
    compare((norm, ce.train(training), scale * x, scale * shortcut, grad), torch.float32, False, True, slack=5)


def test_deterministic():
    case = make(64, 64, 2, (33, 17), torch.float32)
    first, second = (run(case[0], case[1].train(), *case[2:], True, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
