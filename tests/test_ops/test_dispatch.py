"""Which form of the operator is taken on a machine without a GPU, and why; tests/test_kernels has the rest."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from utils import randomize

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import dispatch

X = torch.zeros(1, 16, 4, 4)


def layer(**kwargs) -> ChannelEquilibrium:
    return randomize(ChannelEquilibrium(16, **kwargs)).eval()


def test_a_cpu_takes_torch(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, 'auto')
    layer()(X)
    assert not dispatch._reported


@pytest.mark.parametrize(
    ('choice', 'words'),
    [
        ('cuda', "must be one of auto, torch, triton, got 'cuda'"),
        ('triton', 'the map is on cpu, and the kernels need CUDA'),
    ],
)
def test_what_cannot_be_is_an_error(monkeypatch, choice, words):
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    with pytest.raises((ValueError, RuntimeError), match=f'MMDET_CE_KERNELS.*{words}'):
        layer()(X)


@pytest.mark.parametrize('kwargs', [dict(num_channels=8), dict(num_iterations=9), dict(reduction=16)], ids=str)
def test_layers_that_no_kernel_is_made_for_take_torch(monkeypatch, kwargs):
    monkeypatch.setenv(dispatch.VARIABLE, 'triton')
    layer(**kwargs)(X)


@pytest.fixture
def gpu(monkeypatch):
    """The CPU is a GPU of compute capability 8.0; return the lines of the log."""
    lines = []
    monkeypatch.setattr(dispatch, 'DEVICE_TYPE', 'cpu')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(dispatch, '_reported', set())
    monkeypatch.setattr(dispatch, 'device_obstacle', dispatch.device_obstacle.__wrapped__)  # not remembered
    monkeypatch.setattr(dispatch, 'print_log', lambda line, logger: lines.append(line))
    return lines


def test_an_old_gpu_is_asked_before_triton_is_imported(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    monkeypatch.setitem(sys.modules, 'triton', None)
    for _ in range(2):
        layer()(X)
    assert gpu == ['Channel Equilibrium on cpu: torch (compute capability 7.5 is below 8.0)']


def test_a_triton_that_does_not_import_stops_nobody(monkeypatch, gpu, tmp_path):
    (tmp_path / 'triton.py').write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'triton', raising=False)
    layer()(X)
    (line,) = gpu
    assert 'torch (Triton cannot be imported (libcuda.so.1: cannot open shared object file))' in line


def test_a_trace_and_fake_tensors_take_torch(monkeypatch, gpu):
    monkeypatch.setenv(dispatch.VARIABLE, 'triton')
    ce = layer()
    torch.jit.trace(ce, X, check_trace=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ce(mode.from_tensor(X))
    assert not gpu
