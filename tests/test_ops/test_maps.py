"""The passes over a map, in both memory formats: their equations."""

from __future__ import annotations

import pytest
import torch
from utils import assert_agree

from mmdet_ce.ops import maps

FORMATS = [torch.contiguous_format, torch.channels_last]
NUM_ROWS = 6  # of the result, for each block of the map


def make(memory_format, block_size):
    """Return a map of 8 channels, prepared, its matrices, and a gradient and a shortcut of the result."""
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    channels = 8 // block_size * NUM_ROWS
    others = [torch.randn(3, channels, 4, 5, dtype=torch.float64).to(memory_format=memory_format) for _ in range(2)]
    matrices = x.reshape(-1, block_size, 20).clone()
    x = x.to(memory_format=memory_format)
    h = maps.group(x, block_size, torch.float64, memory_format == torch.channels_last, with_scratch=True)
    return x, h, matrices, *others


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('block_size', [4, 8])
def test_moments(memory_format, block_size):
    _, h, matrices, _, _ = make(memory_format, block_size)
    centered = matrices - matrices.mean(2, keepdim=True)
    expected = centered @ centered.mT / 19
    for with_covariance in (True, False):
        moments = maps.moments(h, with_covariance)
        assert_agree(moments.means.flatten(0, 1), matrices.mean(2), 1e-13)
        wanted = expected if with_covariance else expected.diagonal(dim1=1, dim2=2)
        assert_agree(moments.covariances.flatten(0, 1), wanted, 1e-12)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('block_size', [4, 8])
def test_apply_and_its_backward(memory_format, block_size):
    x, h, matrices, grad, shortcut = make(memory_format, block_size)
    matrix = torch.randn(len(matrices), NUM_ROWS, block_size + 1, dtype=torch.float64)
    factor, constant = matrix[..., :-1], matrix[..., -1:]
    plain = (factor @ matrices + constant).view_as(grad)
    out = maps.apply(h, x, matrix, shortcut, relu=True)
    assert_agree(out, (plain + shortcut).relu(), 1e-12)
    assert out.stride() == grad.stride()
    assert_agree(maps.apply(h, x, matrix), plain, 1e-12)

    d_matrix, dy_map, dy = maps.reduce_backward(grad, h, NUM_ROWS, out)
    expected = (grad * (out > 0)).contiguous().view(len(matrices), NUM_ROWS, 20)
    assert_agree(dy_map, expected.view_as(grad), 1e-14)
    assert_agree(d_matrix, torch.cat([expected @ matrices.mT, expected.sum(2, keepdim=True)], 2), 1e-12)

    root = torch.randn(len(matrices), block_size, block_size, dtype=torch.float64)
    k_vector = torch.randn(len(matrices), block_size, dtype=torch.float64)
    centered = matrices - matrices.mean(2, keepdim=True)
    for k_matrix in (root @ root.mT, root.diagonal(dim1=1, dim2=2)):
        for k in (k_vector, None):
            dh = maps.apply_backward(dy, h, x, matrix, k_matrix, k)
            full = k_matrix if k_matrix.dim() == 3 else k_matrix.diag_embed()
            wanted = factor.mT @ expected + full @ centered + (0 if k is None else k[..., None])
            assert_agree(dh, wanted.view_as(x), 1e-12)
            assert dh.stride() == x.stride()
