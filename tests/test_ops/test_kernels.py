"""Which form of the operator is taken, and why."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from utils import randomize

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import kernels, precision


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


def test_triton_without_triton_says_so(monkeypatch, caplog):
    monkeypatch.setenv(kernels.VARIABLE, 'triton')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    assert kernels._obstacle(torch.device('cpu'), 'triton')
    assert kernels.choose(torch.zeros(1, 16, 4, 4), 16, 3, True) is kernels.TORCH


def test_the_switch_for_tf32_is_read():
    assert precision._tf32_allowed() is False
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert precision._tf32_allowed() is True
        assert precision.small_dtype(torch.zeros(1), double=False) == torch.float32  # TF32 is CUDA's
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


class Launches(TorchDispatchMode):
    """Count operations that start a kernel: those that return no view and no empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0]
        views = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        self.count += not (views or name.startswith(('empty', 'new_empty', 'detach', '_unsafe_view')))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ('training', 'folded', 'budget'), [(True, False, 104), (True, True, 140), (False, False, 52), (False, True, 79)]
)
def test_launches_of_a_layer(training, folded, budget):
    """Forward and backward; on a GPU each costs the host some ten microseconds."""
    norm = randomize(torch.nn.BatchNorm2d(32)).eval()
    ce = randomize(ChannelEquilibrium(32)).train(training)
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    with Launches() as launches:
        ce(x, norm if folded else None, x * 2, relu=True).sum().backward()
    assert launches.count <= budget, launches.count


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('folded', [True, False])
def test_nothing_comes_from_the_host(training, folded):
    """On the meta device an operation with a CPU tensor is an error."""
    norm = torch.nn.BatchNorm2d(32).eval().to('meta')
    ce = ChannelEquilibrium(32, identity_start=True).train(training).to('meta')
    x = torch.zeros(2, 32, 8, 8, device='meta', requires_grad=True)
    ce(x, norm if folded else None, x * 2, relu=True).sum().backward()
    assert x.grad.is_meta and all(p.grad.is_meta for p in ce.parameters())
