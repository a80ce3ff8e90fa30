"""M from both branches of CE: its equation and its gradients."""

from __future__ import annotations

import pytest
import torch
from utils import assert_agree

from mmdet_ce.ops.mixture import mixture, mixture_backward


def make(with_alpha: bool) -> list[torch.Tensor]:
    tensors = [torch.randn(2, 4, 4), torch.rand(3, 8), 1 + torch.rand(1), torch.randn(1)]
    return [t.double() for t in (*tensors, torch.rand(1))[: 4 + with_alpha]]


def test_the_equation():
    whitening, gate, scale, theta, alpha = make(True)
    lambda_ = torch.sigmoid(theta)
    matrix = mixture(whitening, gate, scale, theta, alpha).matrix
    for n in range(3):
        for g in range(2):
            ce = lambda_ * whitening[g] + (1 - lambda_) * torch.diag(gate[n, 4 * g : 4 * g + 4] / scale)
            eye = torch.eye(4, dtype=torch.float64)
            assert_agree(matrix[n, g], (1 - alpha) * eye + alpha * ce, 1e-14)


@pytest.mark.parametrize('with_alpha', [True, False])
def test_backward_is_the_gradient(with_alpha):
    tensors = [t.requires_grad_() for t in make(with_alpha)]
    whitening, gate, scale, theta, *alpha = tensors
    state = mixture(whitening, gate, scale, theta, *(alpha or [None]))
    grad = torch.randn_like(state.matrix)
    expected = torch.autograd.grad(state.matrix, tensors, grad)
    with torch.no_grad():
        actual = mixture_backward(state, *(alpha or [None]), grad, training=True)
        in_evaluation = mixture_backward(state, *(alpha or [None]), grad, training=False)
    assert_agree(actual.whitening, expected[0], 1e-12)
    assert_agree(actual.log_gate, expected[1] * gate.detach(), 1e-12)
    assert_agree(actual.log_inverse_scale, -expected[2] * scale.detach(), 1e-12)
    assert_agree(actual.theta, expected[3], 1e-12)
    assert in_evaluation.whitening is None and torch.equal(in_evaluation.log_gate, actual.log_gate)
    assert (actual.alpha is None) if not with_alpha else assert_agree(actual.alpha, expected[4], 1e-12) is None
