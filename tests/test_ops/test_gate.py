"""The gate of instance reweighting: its equation and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from utils import assert_agree

from mmdet_ce.ops.gate import GateParameters, gate, gate_backward


def make() -> tuple[torch.Tensor, GateParameters]:
    parameters = [torch.randn(shape, dtype=torch.float64) for shape in ((6, 24), (6,), (6,), (24, 6))]
    return torch.rand(3, 24, dtype=torch.float64), GateParameters(*parameters)


def test_the_equation():
    v, (w1, ln_weight, ln_bias, w2) = make()
    expected = torch.sigmoid(F.relu(F.layer_norm(v @ w1.T, (6,), ln_weight, ln_bias, 1e-5)) @ w2.T)
    assert_agree(gate(v, GateParameters(w1, ln_weight, ln_bias, w2)).gate, expected, 1e-14)


def test_backward_is_the_gradient():
    v, parameters = make()
    tensors = [t.requires_grad_() for t in (v, *parameters)]
    out = gate(tensors[0], GateParameters(*tensors[1:]))
    grad = torch.randn_like(out.gate)
    expected = torch.autograd.grad(out.gate, tensors, grad)
    with torch.no_grad():
        d_variance, d_parameters = gate_backward(out, parameters, grad * out.gate)
    for actual, value in zip((d_variance, *d_parameters), expected):
        assert_agree(actual, value, 1e-12)
