"""The Newton iteration against the paper's form and against the exact inverse square root."""

from __future__ import annotations

import pytest
import torch
from utils import assert_agree

from mmdet_ce.ops import inverse_sqrt_newton
from mmdet_ce.ops.newton import whiten, whiten_backward


def covariance(d: int, condition: float, dtype: torch.dtype) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    return (q @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d).double()) @ q.T).to(dtype)


def normalized(sigma: torch.Tensor) -> torch.Tensor:
    return (sigma / sigma.trace())[None]


@pytest.mark.parametrize('num_iterations', [1, 2, 3, 5])
def test_coupled_form_equals_the_papers(num_iterations):
    sigma = covariance(16, 1e3, torch.float64)
    p = torch.eye(16, dtype=torch.float64)
    for _ in range(num_iterations):
        p = 1.5 * p - 0.5 * p @ p @ p @ sigma / sigma.trace()
    assert_agree(inverse_sqrt_newton(normalized(sigma), num_iterations)[0], p, 1e-12)


def test_converges_to_the_inverse_square_root():
    sigma = covariance(16, 1e2, torch.float64)
    values, vectors = torch.linalg.eigh(sigma / sigma.trace())
    assert_agree(inverse_sqrt_newton(normalized(sigma), 20)[0], vectors @ torch.diag(values.rsqrt()) @ vectors.T, 1e-9)


@pytest.mark.parametrize('num_iterations', [1, 3, 8])
def test_whitening_backward_is_the_gradient(num_iterations):
    root = torch.randn(2, 6, 6, dtype=torch.float64)
    sigma = (root @ root.mT).requires_grad_()
    whitening = whiten(sigma.clone(), 1e-3, num_iterations)
    grad = torch.randn(2, 6, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(whitening.whitening, sigma, grad)
    with torch.no_grad():
        actual = whiten_backward(grad, num_iterations, whitening)
    assert_agree(actual, 0.5 * (expected + expected.mT), 1e-11)
