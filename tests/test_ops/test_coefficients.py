"""M from both branches of CE: its equation and its gradients."""

from __future__ import annotations

import pytest
import torch
from utils import assert_agree

from mmdet_ce.ops.coefficients import mixture, mixture_backward
from mmdet_ce.ops.records import Inputs, Saved


def make(with_alpha: bool) -> list[torch.Tensor]:
    """Return P, the gate, s, theta and perhaps alpha."""
    tensors = [torch.randn(2, 4, 4), torch.rand(3, 8), 1 + torch.rand(1), torch.randn(1)]
    return [t.double().requires_grad_() for t in (*tensors, torch.rand(1))[: 4 + with_alpha]]


def run(whitening, gate, scale, theta, alpha=None) -> tuple[Inputs, Saved]:
    inputs = Inputs(*(None,) * 4, alpha, theta, *(None,) * 4)
    lambda_, reweighting, ce_matrix, matrix = mixture(whitening, gate, scale, inputs)
    saved = Saved(lambda_=lambda_, whitening=whitening, reweighting=reweighting, ce_matrix=ce_matrix, matrix=matrix)
    return inputs, saved


def test_the_equation():
    whitening, gate, scale, theta, alpha = tensors = make(True)
    lambda_, eye = torch.sigmoid(theta), torch.eye(4, dtype=torch.float64)
    matrix = run(*tensors)[1].matrix
    for n in range(3):
        for g in range(2):
            ce = lambda_ * whitening[g] + (1 - lambda_) * torch.diag(gate[n, 4 * g : 4 * g + 4] / scale)
            assert_agree(matrix[n, g], (1 - alpha) * eye + alpha * ce, 1e-14)


@pytest.mark.parametrize('with_alpha', [True, False])
def test_backward_is_the_gradient(with_alpha):
    tensors = make(with_alpha)
    inputs, saved = run(*tensors)
    grad = torch.randn_like(saved.matrix)
    d_whitening, d_gate, d_scale, d_theta, *d_alpha = torch.autograd.grad(saved.matrix, tensors, grad)
    gate, scale = tensors[1].detach(), tensors[2].detach()
    with torch.no_grad():
        in_evaluation = mixture_backward(saved, inputs, grad)
        actual = mixture_backward(saved._replace(normalized=torch.ones(1)), inputs, grad)
    expected = [*(d_alpha or [None]), d_theta, d_gate * gate, -d_scale * scale, d_whitening]
    for a, b in zip(actual, expected):
        assert (a is b is None) or assert_agree(a, b, 1e-12) is None
    assert torch.equal(in_evaluation[2], actual[2]) and in_evaluation[3] is in_evaluation[4] is None
