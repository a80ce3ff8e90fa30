"""The Newton iteration against the paper's form and against the exact inverse square root."""

from __future__ import annotations

import pytest
import torch
from utils import assert_agree

from mmdet_ce.ops import inverse_sqrt_newton
from mmdet_ce.ops.newton import inverse_sqrt_newton_derivative, whitening, whitening_backward
from mmdet_ce.ops.records import Saved


def covariance(d: int, condition: float, dtype: torch.dtype) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    return (q @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d).double()) @ q.T).to(dtype)


def normalized(sigma: torch.Tensor) -> torch.Tensor:
    return (sigma / sigma.trace())[None]


def test_two_by_two_by_hand():
    """Sigma = diag(3, 1): Sigma_N = diag(3/4, 1/4), P_1 = 1.5 - 0.5 Sigma_N, P_2 = 1.5 P_1 - 0.5 P_1^3 Sigma_N."""
    sigma = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    expected = torch.diag(torch.tensor([1.125, 1.375], dtype=torch.float64))
    assert torch.allclose(inverse_sqrt_newton(normalized(sigma), 1)[0], expected)
    expected = torch.diag(
        torch.tensor([1.5 * 1.125 - 0.5 * 1.125**3 * 0.75, 1.5 * 1.375 - 0.5 * 1.375**3 * 0.25], dtype=torch.float64)
    )
    assert torch.allclose(inverse_sqrt_newton(normalized(sigma), 2)[0], expected)


@pytest.mark.parametrize('num_iterations', [1, 2, 3, 5])
def test_coupled_form_equals_the_papers(num_iterations):
    sigma = covariance(16, 1e3, torch.float64)
    p = torch.eye(16, dtype=torch.float64)
    for _ in range(num_iterations):
        p = 1.5 * p - 0.5 * p @ p @ p @ sigma / sigma.trace()
    assert_agree(inverse_sqrt_newton(normalized(sigma), num_iterations)[0], p, 1e-12)


@pytest.mark.parametrize('num_iterations', [3, 12, 20, 40])
def test_ill_conditioned_float32_stays_finite(num_iterations):
    """The uncoupled form is NaN here from some twelve steps on."""
    sigma = covariance(64, 1e6, torch.float32)
    assert torch.isfinite(inverse_sqrt_newton(normalized(sigma), num_iterations)).all()


def test_converges_to_the_inverse_square_root():
    sigma = covariance(16, 1e2, torch.float64)
    values, vectors = torch.linalg.eigh(sigma / sigma.trace())
    assert_agree(inverse_sqrt_newton(normalized(sigma), 20)[0], vectors @ torch.diag(values.rsqrt()) @ vectors.T, 1e-9)


@pytest.mark.parametrize('num_iterations', [1, 3, 8])
def test_whitening_backward_is_the_gradient(num_iterations):
    root = torch.randn(2, 6, 6, dtype=torch.float64)
    sigma = (root @ root.mT).requires_grad_()
    trace, normalized, p = whitening(sigma, 1e-3, num_iterations)
    grad = torch.randn(2, 6, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(p, sigma, grad)
    actual = whitening_backward(Saved(trace=trace.detach(), normalized=normalized.detach()), num_iterations, grad)
    assert_agree(actual, 0.5 * (expected + expected.mT), 1e-11)


@pytest.mark.parametrize('num_iterations', [1, 3, 8])
def test_derivative_is_autograds_gradient(num_iterations):
    sigma = normalized(covariance(6, 1e2, torch.float64)).requires_grad_()
    grad = torch.randn(1, 6, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(inverse_sqrt_newton(sigma, num_iterations), sigma, grad)
    derivative = inverse_sqrt_newton_derivative(sigma.detach(), grad, num_iterations)
    assert_agree(derivative, 0.5 * (expected + expected.transpose(1, 2)), 1e-12)
