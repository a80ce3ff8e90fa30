"""Which form of the operator is taken, and why."""

from __future__ import annotations

import re

import pytest
import torch

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
