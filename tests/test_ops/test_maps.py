"""The passes over a map, in both memory formats: their equations."""

from __future__ import annotations

import pytest
import torch
from utils import assert_agree

from mmdet_ce.ops import maps

FORMATS = [torch.contiguous_format, torch.channels_last]


def make(memory_format):
    """Return a map, a gradient and a shortcut, and what a group's matrices of the first two are."""
    tensors = [torch.randn(3, 8, 4, 5, dtype=torch.float64) for _ in range(3)]
    groups = [t.reshape(3, 2, 4, 20) for t in tensors[:2]]
    return [t.to(memory_format=memory_format) for t in tensors], groups


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('with_scratch', [True, False])
def test_reduce(memory_format, with_scratch):
    (x, *_), (groups, _) = make(memory_format)
    grouped = maps.group(x, 4, torch.float64, with_scratch=with_scratch)
    centered = groups - groups.mean(3, keepdim=True)
    for with_covariance in (True, False):
        means, scatter = maps.reduce(grouped, with_covariance)
        expected = centered @ centered.mT
        assert_agree(means, groups.mean(3), 1e-13)
        scatter = scatter * maps.SCATTER_UNIT
        assert_agree(scatter, expected if with_covariance else expected.diagonal(dim1=2, dim2=3), 1e-12)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('with_scratch', [True, False])
def test_apply_and_its_backward(memory_format, with_scratch):
    (x, grad, shortcut), (groups, _) = make(memory_format)
    matrix, k_matrix = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    k_matrix = k_matrix + k_matrix.mT
    constant = torch.randn(3, 2, 4, dtype=torch.float64)
    grouped = maps.group(x, 4, torch.float64, with_scratch=with_scratch)
    plain = (matrix @ groups + constant[..., None]).view_as(x)
    assert_agree(maps.apply(grouped, matrix, None), (matrix @ groups).view_as(x), 1e-12)
    out = maps.apply(grouped, matrix, constant, shortcut, relu=True)
    assert_agree(out, (plain + shortcut).relu(), 1e-12)
    assert out.stride() == x.stride()
    d_matrix, d_constant, dy, dy_grouped = maps.reduce_backward(grad, grouped, out)
    expected = (grad * (out > 0)).contiguous().view(3, 2, 4, 20)
    assert_agree(dy, expected.view_as(x), 1e-14)
    assert_agree(d_matrix, expected @ groups.mT, 1e-12)
    assert_agree(d_constant, expected.sum(3), 1e-12)
    for k in (k_matrix, k_matrix.diagonal(dim1=2, dim2=3)):
        dx = maps.apply_backward(dy_grouped, grouped, matrix, k, constant)
        full = k if k.dim() == 4 else k.diag_embed()
        assert_agree(dx, (matrix.mT @ expected + full @ groups - constant[..., None]).view_as(x), 1e-12)
        assert dx.stride() == x.stride()
