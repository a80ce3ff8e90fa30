"""The complexity tool counts CE's matrix products."""

from __future__ import annotations

import complexity
import pytest

from mmdet_ce import CEResNet


def test_counts_the_products_of_ce():
    size = (64, 96)
    plain, ce = CEResNet(depth=18, ce_cfg=None), CEResNet(depth=18)
    parameters, flops, _ = complexity.count(plain, size)
    ce_parameters, ce_flops, skipped = complexity.count(ce, size)
    positions = {'ce1': 32 * 48, 'layer1': 16 * 24, 'layer2': 8 * 12, 'layer3': 4 * 6}
    layers = [(positions[name.split('.')[0]], layer) for name, layer in ce.named_ce()]
    products = sum(layer.in_channels * layer.group_size * length for length, layer in layers)
    assert ce_parameters - parameters == sum(p.numel() for _, layer in layers for p in layer.parameters())
    # Beside them the gates' small matrices are added, and the norms that are folded disappear.
    assert ce_flops - flops == pytest.approx(products, rel=0.15)
    assert not any('mm' in name for name in skipped)
