"""Which form of the operator is taken, and why."""

from __future__ import annotations

import re

import pytest
import torch
from budgets import layer_budget
from utils import randomize

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import kernels


@pytest.fixture(autouse=True)
def _decide_anew():
    kernels._triton_on.cache_clear()
    yield
    kernels._triton_on.cache_clear()


@pytest.mark.parametrize('choice', ['auto', 'torch'])
def test_a_cpu_takes_torch(monkeypatch, choice):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    assert kernels.choose(torch.zeros(1, 16, 4, 4), 16, 3, True) is kernels.TORCH


def test_another_value_is_an_error(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, 'cuda')
    with pytest.raises(ValueError, match="MMDET_CE_KERNELS must be one of auto, torch, triton, got 'cuda'"):
        kernels.choose(torch.zeros(1, 16, 4, 4), 16, 3, True)


def test_the_choice_and_its_reason_are_logged_once(monkeypatch):
    lines = []
    monkeypatch.setattr(kernels, 'print_log', lambda line, logger: lines.append(line))
    monkeypatch.setenv(kernels.VARIABLE, 'triton')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    for _ in range(3):
        assert kernels.choose(torch.zeros(1, 16, 4, 4), 16, 3, True) is kernels.TORCH
    (line,) = lines
    assert re.fullmatch(r'Channel Equilibrium on cpu: torch \((triton .*|the kernels need CUDA.*)\)', line)


@pytest.mark.parametrize(
    ('capability', 'choice', 'obstacle'),
    [
        ((7, 5), 'triton', 'compute capability 7.5 is below 8.0'),
        ((8, 6), 'auto', 'not tested on compute capability 8.6; MMDET_CE_KERNELS=triton takes Triton'),
        ((8, 6), 'triton', None),
        ((9, 0), 'auto', None),
    ],
)
def test_auto_takes_triton_where_it_was_tested(capability, choice, obstacle, monkeypatch):
    monkeypatch.setattr(kernels, 'TESTED_CAPABILITIES', {(9, 0)})
    assert kernels.capability_obstacle(capability, choice) == obstacle


@pytest.mark.parametrize(
    ('training', 'folded', 'tail', 'forward', 'backward'),
    [  # kernels launched; reads and writes of a map
        (True, False, False, (46, 6), (46, 7)),
        (True, True, True, (61, 11), (66, 11)),
        (False, False, False, (21, 6), (20, 7)),
        (False, True, True, (32, 11), (35, 11)),
    ],
)
def test_a_layer_stays_in_its_budget(training, folded, tail, forward, backward):
    """A launch costs the host of a GPU some ten microseconds; a map is read and written at the memory's speed."""
    norm = randomize(torch.nn.BatchNorm2d(32)).eval() if folded else None
    ce = randomize(ChannelEquilibrium(32)).train(training)
    counts = layer_budget(ce, torch.randn(2, 32, 24, 24), norm, tail)
    for name, count, budget in zip(('forward', 'backward'), counts, (forward, backward)):
        assert count[0] <= budget[0], f'{name}: {count[0]} launches'
        assert count[1] <= budget[1], f'{name}: {count[1]} reads and writes of a map'


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('folded', [True, False])
def test_nothing_comes_from_the_host(training, folded):
    """On the meta device an operation with a CPU tensor is an error."""
    norm = torch.nn.BatchNorm2d(32).eval().to('meta')
    ce = ChannelEquilibrium(32, identity_start=True).train(training).to('meta')
    x = torch.zeros(2, 32, 8, 8, device='meta', requires_grad=True)
    ce(x, norm if folded else None, x * 2, relu=True).sum().backward()
    assert x.grad.is_meta and all(p.grad.is_meta for p in ce.parameters())
