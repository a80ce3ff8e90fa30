"""A norm folded into CE: the product of x from that of z, and the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from utils import assert_agree, randomize

from mmdet_ce.ops.norm_affine import affine, affine_backward, fold, fold_backward, moments_backward
from mmdet_ce.ops.records import Inputs, Saved


def make(has_affine: bool = True) -> tuple[nn.BatchNorm2d, Inputs]:
    norm = randomize(nn.BatchNorm2d(8, affine=has_affine)).double().eval()
    return norm, Inputs(norm.running_mean, norm.running_var, norm.weight, norm.bias, *(None,) * 6)


@pytest.mark.parametrize('has_affine', [True, False])
def test_a_product_of_x_is_one_of_z(has_affine):
    norm, inputs = make(has_affine)
    _, a, b = affine(inputs, norm.eps, 4)
    z, matrix = torch.randn(3, 8, 5, 5, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    x, groups = (t.reshape(3, 2, 4, 25) for t in (norm(z), z))
    assert_agree(a[..., None] * groups + b[..., None], x, 1e-12)
    product, constant = fold(matrix, a, b)
    assert_agree(product @ groups + constant[..., None], matrix @ x, 1e-12)


def test_backward_is_the_gradient():
    norm, inputs = make()
    matrix = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    variance = torch.rand(3, 2, 4, dtype=torch.float64, requires_grad=True)
    covariance = torch.randn(2, 4, 4, dtype=torch.float64)
    covariance = (covariance + covariance.mT).requires_grad_()
    rstd, a, b = affine(inputs, norm.eps, 4)
    outputs = (*fold(matrix, a, b), variance * a.square(), a[:, :, None] * covariance * a[:, None, :])
    grads = [torch.randn_like(out) for out in outputs]
    grads[3] = grads[3] + grads[3].mT
    expected = torch.autograd.grad(outputs, (matrix, variance, covariance, norm.weight, norm.bias), grads)
    saved = Saved(rstd=rstd, a=a, b=b, matrix=matrix, z_variance=variance, z_covariance=covariance)
    with torch.no_grad():
        d_matrix, d_a, d_b = fold_backward(saved, *grads[:2])
        d_a, d_variance, d_covariance = moments_backward(saved, d_a, *grads[2:], share=1)
        d_norm = affine_backward(saved, inputs, d_a, d_b)
    for actual, value in zip((d_matrix, d_variance, d_covariance, *d_norm), expected):
        assert_agree(actual, value, 1e-12)
