"""Channel analysis: measures by hand, what is measured of which layer, and nothing changed by measuring."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mmdet.models import ResNet
from utils import NoFloat64, randomize

from mmdet_ce import CEMobileNetV2, CEResNet
from mmdet_ce.channel_analysis import analyze_channels, inhibited_share, normalized_entropy, off_diagonal_energy

SMALL = dict(depth=18, base_channels=16)


def images(count=4, size=48):
    return torch.randn(count, 3, size, size)


def test_inhibited_share():
    assert inhibited_share(np.array([0.0, 0.1, 0.9, 3.0]), 0.1) == 0.5
    assert inhibited_share(np.zeros(4)) == 1  # a layer that never responds


def test_normalized_entropy():
    assert normalized_entropy(np.full(8, 3.0)) == pytest.approx(1)
    assert normalized_entropy(np.array([0.0, 2.0, 0.0])) == 0
    assert normalized_entropy(np.zeros(3)) == 0
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert normalized_entropy(np.array([1.0, 3.0])) == pytest.approx(expected)


def test_off_diagonal_energy():
    same, alone = np.ones((2, 2)), np.diag([4.0, 1.0])
    assert off_diagonal_energy(same[None]) == pytest.approx(0.5)
    assert off_diagonal_energy(alone[None]) == 0
    assert off_diagonal_energy(np.stack([same, alone, np.zeros((2, 2))])) == pytest.approx(0.5 / 3)


def test_layers_pair_up():
    plain = analyze_channels(ResNet(**SMALL), [images()])
    ce = analyze_channels(randomize(CEResNet(**SMALL)), [images()])
    slots = ['bn1', *(f'layer{stage}.{block}.bn2' for stage in (1, 2, 3) for block in (0, 1))]
    assert list(plain) == list(ce)
    assert [name for name, layer in ce.items() if layer.ce] == slots
    assert not any(layer.ce for layer in plain.values())
    assert 'layer4.1.bn1' in plain and not any('downsample' in name for name in plain)


def test_values_of_a_layer_by_hand():
    backbone, x = randomize(CEResNet(**SMALL)).eval(), images()
    layer = analyze_channels(backbone, x.split([3, 1]))['bn1']
    with torch.no_grad():
        before = backbone.norm1(backbone.conv1(x))
        after = backbone.ce1(before)
    contribution = after.relu().mean((0, 2, 3)).double().numpy()
    contribution_before = before.relu().mean((0, 2, 3)).double().numpy()
    assert layer.contribution == pytest.approx(contribution, rel=1e-5)
    assert layer.before_ce == pytest.approx(contribution_before, rel=1e-5)
    row = layer.measures(threshold=0.5)
    assert row['inhibited'] == (contribution <= 0.5 * contribution.mean()).mean() > 0
    assert row['entropy_before'] == pytest.approx(normalized_entropy(contribution_before))
    assert row['lambda'] == pytest.approx(torch.sigmoid(backbone.ce1.theta).item())
    for key, value in (('off_diagonal_before', before), ('off_diagonal_after', after)):
        covariance = np.cov(value.double().transpose(0, 1).flatten(1).numpy(), bias=True)
        assert row[key] == pytest.approx(off_diagonal_energy(covariance[None]), rel=1e-4)  # d = C = 16: one group


def test_gate_is_the_one_that_ce_applies():
    """With lambda = 0 and s = 1 the block is its gate."""
    backbone, x = randomize(CEResNet(**SMALL)).eval(), images()
    with torch.no_grad():
        backbone.ce1.theta.fill_(-100)
        backbone.ce1.ir.running_scale.fill_(1)
        before = backbone.norm1(backbone.conv1(x))
        gate = backbone.ce1(before)[:, :, 5, 5] / before[:, :, 5, 5]
    row = analyze_channels(backbone, x.split([3, 1]))['bn1'].measures()
    for percent in (5, 50, 95):
        assert row[f'gate_{percent}'] == pytest.approx(np.percentile(gate, percent), rel=1e-4)


def test_ce_at_other_places():
    x = images(2)
    second = randomize(CEResNet(depth=50, base_channels=8, ce_position='after_norm2', stem_with_ce=False))
    slots = [name for name, layer in analyze_channels(second, [x]).items() if layer.ce]
    assert slots[:2] == ['layer1.0.bn2', 'layer1.1.bn2'] and all(name.endswith('bn2') for name in slots)
    plugin = dict(cfg=dict(type='ChannelEquilibrium'), stages=(True, False, False, False), position='after_conv3')
    layers = analyze_channels(ResNet(depth=50, base_channels=8, plugins=[plugin]), [x])
    assert [name for name, layer in layers.items() if layer.ce] == [f'layer1.{i}.bn3' for i in range(3)]
    mobile = analyze_channels(randomize(CEMobileNetV2(widen_factor=0.25)), [x])
    assert mobile['layer1.0.linear_conv.bn'].ce and not mobile['conv1.bn'].ce


def interrupted(x):
    yield x
    raise KeyboardInterrupt


def test_changes_nothing_where_it_is_interrupted_too():
    backbone, x = randomize(CEResNet(norm_eval=False, frozen_stages=1, **SMALL)).train(), images()
    modes = [m.training for m in backbone.modules()]
    state = {key: t.clone() for key, t in backbone.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        analyze_channels(backbone, interrupted(x))
    assert [m.training for m in backbone.modules()] == modes
    assert not any(m._forward_hooks for m in backbone.modules())
    assert all(torch.equal(t, state[key]) for key, t in backbone.state_dict().items())


def test_a_device_without_float64():
    backbone = randomize(CEResNet(**SMALL))
    with NoFloat64():
        assert 'bn1' in analyze_channels(backbone, [images()])


def test_nothing_to_measure():
    with pytest.raises(ValueError, match='nothing to measure: there is no image'):
        analyze_channels(ResNet(**SMALL), [])
