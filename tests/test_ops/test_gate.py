"""The gate of instance reweighting: its equation and its gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from utils import assert_agree

from mmdet_ce.ops.gate import gate, gate_backward
from mmdet_ce.ops.records import Parameters


def make() -> tuple[torch.Tensor, Parameters]:
    """Return variances and the parameters of the gate."""
    shapes = dict(fc1_weight=(6, 24), ln_weight=(6,), ln_bias=(6,), fc2_weight=(24, 6))
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    others = dict.fromkeys(('theta', 'alpha', 'conv_weight', 'norm_weight', 'norm_bias'))
    return torch.rand(3, 24, dtype=torch.float64), Parameters(**tensors, **others)


@pytest.mark.parametrize('size', [1e-6, 1.0, 1e8])
def test_the_equation_and_its_gradient(size):
    v, p = make()
    inputs = [(size * v).requires_grad_(), *(t.requires_grad_() for t in p if t is not None)]
    v, w1, ln_weight, ln_bias, w2 = inputs
    expected = torch.sigmoid(F.relu(F.layer_norm(v @ w1.T, (6,), ln_weight, ln_bias, 1e-5)) @ w2.T)
    saved = gate(v, p)
    assert_agree(saved.gate, expected, 1e-14)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, grad)
    with torch.no_grad():
        actual = gate_backward(grad * saved.gate, SimpleNamespace(variance=v, **saved._asdict()), p)
    for name, value, wanted in zip(actual._fields, actual, gradients):
        assert_agree(value, wanted, 1e-12, name)
