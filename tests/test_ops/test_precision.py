"""TF32, emulated: harmless in the products over a map, and kept out of the small matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from utils import randomize, reference

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import precision


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to TF32's ten bits of mantissa, to the nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class TF32(TorchDispatchMode):
    """Round the factors of every float32 product, as CUDA's tensor cores do where TF32 is allowed."""

    FACTORS = {'mm': (0, 1), 'bmm': (0, 1), 'addmm': (1, 2), 'baddbmm': (1, 2), 'baddbmm_': (1, 2)}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        factors = self.FACTORS.get(func.__name__.split('.')[0], ())
        if factors and args[factors[0]].dtype == torch.float32:
            self.count += 1
            args = [rounded_to_tf32(a) if i in factors else a for i, a in enumerate(args)]
        return func(*args, **(kwargs or {}))


def errors(num_iterations: int) -> tuple[float, float, int]:
    """Return how far output and whitening under TF32 are from float64, of the largest magnitude, and the products."""
    ce = randomize(ChannelEquilibrium(32, num_iterations=num_iterations))
    x = torch.randn(2, 32, 16, 16) * torch.logspace(0, -2, 32).view(-1, 1, 1) + 3 * torch.randn(1, 32, 1, 1)
    expected = reference(copy.deepcopy(ce).double(), x.double())
    before = ce.bd.running_whitening.clone()
    x.requires_grad_()
    with TF32() as products:
        out = ce(x)
        out.sum().backward()
    whitening = (ce.bd.running_whitening - 0.9 * before) / 0.1
    assert torch.isfinite(x.grad).all()

    def error(actual, exact):
        return ((actual - exact).abs().max() / exact.abs().max()).item()

    return error(out, expected.out), error(whitening, expected.whitening), products.count


@pytest.fixture
def tf32_allowed(monkeypatch):
    """Let the operator take a CPU's tensors for those of a GPU whose user has allowed TF32."""
    monkeypatch.setattr(precision, 'multiplies_in_tf32', lambda x: True)


@pytest.mark.parametrize('num_iterations', [3, 8])
def test_small_matrices_are_exact_while_a_map_is_multiplied_in_tf32(num_iterations, tf32_allowed):
    out, whitening, count = errors(num_iterations)
    assert count  # products were rounded
    assert whitening < 5e-5 and out < 2e-3, (whitening, out)
