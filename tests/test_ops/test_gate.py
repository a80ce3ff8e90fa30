"""The gate of instance reweighting: its equation and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from utils import assert_agree

from mmdet_ce.ops.gate import gate, gate_backward
from mmdet_ce.ops.records import Inputs, Saved

SIZES = [1e-6, 1.0, 1e30]  # of the variances; from 1e12 on they are divided by their largest
FLOAT32 = [(torch.float32, size, 1e-5) for size in (1.0, 1e8, 1e20, 1e36)]


def make() -> list[torch.Tensor]:
    """Return variances, and W1, LayerNorm's weight and bias, and W2."""
    shapes = (6, 24), (6,), (6,), (24, 6)
    return [torch.rand(3, 24, dtype=torch.float64), *(torch.randn(shape, dtype=torch.float64) for shape in shapes)]


def run(variance: torch.Tensor, *parameters: torch.Tensor) -> tuple[Inputs, Saved]:
    inputs = Inputs(*(None,) * 6, *parameters)
    return inputs, Saved(*(None,) * 5, *gate(variance, inputs))


@pytest.mark.parametrize('dtype, size, tolerance', [*((torch.float64, s, 1e-14) for s in SIZES), *FLOAT32])
def test_the_equation(dtype, size, tolerance):
    v, w1, ln_weight, ln_bias, w2 = make()
    v = size * v
    expected = torch.sigmoid(F.relu(F.layer_norm(v @ w1.T, (6,), ln_weight, ln_bias, 1e-5)) @ w2.T)
    _, saved = run(*(t.to(dtype) for t in (v, w1, ln_weight, ln_bias, w2)))
    assert_agree(saved.gate, expected, tolerance)


@pytest.mark.parametrize('size', SIZES)
def test_backward_is_the_gradient(size):
    v, *parameters = make()
    tensors = [t.requires_grad_() for t in (size * v, *parameters)]
    inputs, saved = run(*tensors)
    grad = torch.randn_like(saved.gate)
    expected = torch.autograd.grad(saved.gate, tensors, grad)
    with torch.no_grad():
        d_variance, d_parameters = gate_backward(saved, inputs, grad * saved.gate)
    for actual, value in zip((d_variance, *d_parameters), expected):
        assert_agree(actual, value, 1e-12)
