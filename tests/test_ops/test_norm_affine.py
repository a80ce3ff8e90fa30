"""A norm folded into CE: moments and products of x from those of z, and the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from utils import assert_agree, randomize

from mmdet_ce.ops.norm_affine import EvalNorm, Folded, Unfolded


def make(affine: bool = True) -> nn.BatchNorm2d:
    return randomize(nn.BatchNorm2d(8, affine=affine)).double().eval()


@pytest.mark.parametrize('affine', [True, False])
def test_moments_and_product_of_x_follow_from_those_of_z(affine):
    norm = make(affine)
    folded = Folded.of(EvalNorm.of(norm), 4, torch.float64)
    z = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    x = norm(z)
    (z, x), matrix = (t.reshape(3, 2, 4, 25) for t in (z, x)), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    assert_agree(folded.mean(z.mean(3)), x.mean(3), 1e-12)
    assert_agree(folded.variance(z.var(3)), x.var(3), 1e-12)
    covariances = [torch.stack([torch.cov(t[0, g]) for g in range(2)]) for t in (z, x)]
    assert_agree(folded.covariance(covariances[0]), covariances[1], 1e-12)
    product, constant = folded.fold(matrix)
    assert_agree(product @ z + constant[..., None], matrix @ x, 1e-12)


def test_backward_is_the_gradient():
    norm = make()
    matrix = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    variance = torch.rand(3, 2, 4, dtype=torch.float64, requires_grad=True)
    covariance = torch.randn(2, 4, 4, dtype=torch.float64)
    covariance = (covariance + covariance.mT).requires_grad_()
    folded = Folded.of(EvalNorm.of(norm), 4, torch.float64)
    outputs = (*folded.fold(matrix), folded.variance(variance), folded.covariance(covariance))
    grads = [torch.randn_like(out) for out in outputs]
    grads[3] = grads[3] + grads[3].mT
    expected = torch.autograd.grad(outputs, (matrix, variance, covariance, norm.weight, norm.bias), grads)
    with torch.no_grad():
        actual = [
            folded.fold_backward(matrix, *grads[:2]),
            folded.variance_backward(variance, grads[2]),
            folded.covariance_backward(covariance, grads[3], 1),
            *folded.gradients(),
        ]
    for a, b in zip(actual, expected):
        assert_agree(a, b, 1e-12)


def test_without_a_norm_nothing_changes():
    matrix = torch.randn(3, 2, 4, 4)
    none = Unfolded()
    assert none.fold(matrix) == (matrix, None) and none.fold_backward(matrix, matrix, None) is matrix
    assert none.gradients() == (None, None)
