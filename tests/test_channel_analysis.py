"""Channel analysis: measures by hand, what is measured of which layer, and nothing changed by measuring."""

from __future__ import annotations

import math

import pytest
import torch
from mmdet.models import ResNet
from torch import nn
from utils import assert_agree, randomize

from mmdet_ce import CEMobileNetV2, CEResNet
from mmdet_ce.channel_analysis import (
    analyze_channels,
    inhibited_share,
    normalized_entropy,
    off_diagonal_energy,
)

SMALL = dict(depth=18, base_channels=16)


def images(count=4, size=48):
    return torch.randn(count, 3, size, size)


def test_inhibited_share():
    assert inhibited_share(torch.tensor([0.0, 0.1, 0.2, 5.0]), 0.1) == 0.5
    assert inhibited_share(torch.zeros(4), 0.0) == 1  # a layer that never responds


def test_normalized_entropy():
    assert normalized_entropy(torch.full((8,), 3.0)) == pytest.approx(1)
    assert normalized_entropy(torch.tensor([0.0, 2.0, 0.0])) == 0
    assert normalized_entropy(torch.zeros(3)) == 0
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert normalized_entropy(torch.tensor([1.0, 3.0])) == pytest.approx(expected)


def test_off_diagonal_energy():
    same, alone = torch.ones(2, 2), torch.diag(torch.tensor([4.0, 1.0]))
    assert off_diagonal_energy(same[None]) == pytest.approx(0.5)
    assert off_diagonal_energy(alone[None]) == 0
    assert off_diagonal_energy(torch.stack([same, alone, torch.zeros(2, 2)])) == pytest.approx(0.5 / 3)


def test_layers_pair_up():
    plain = analyze_channels(ResNet(**SMALL), [images()])
    ce = analyze_channels(randomize(CEResNet(**SMALL)), [images()])
    slots = ['bn1', *(f'layer{stage}.{block}.bn2' for stage in (1, 2, 3) for block in (0, 1))]
    assert list(plain) == list(ce)
    assert [name for name, layer in ce.items() if layer.ce is not None] == slots
    assert not any(layer.ce for layer in plain.values())
    assert 'layer4.1.bn1' in plain and not any('downsample' in name for name in plain)
    assert [name for name in plain if name.startswith('output')] == [f'output.{i}' for i in range(4)]


def test_values_of_a_layer_by_hand():
    """Over all images, however they are batched."""
    backbone, x = randomize(CEResNet(**SMALL)).eval(), images()
    layers = analyze_channels(backbone, x.split([3, 1]))
    with torch.no_grad():
        before = backbone.norm1(backbone.conv1(x))
        after = backbone.ce1(before)
        outputs = backbone(x)
    layer = layers['bn1']
    assert_agree(layer.contribution, after.relu().mean((0, 2, 3)).double(), 1e-5)
    assert_agree(layer.ce.contribution_before, before.relu().mean((0, 2, 3)).double(), 1e-5)
    assert torch.equal(layer.gamma, backbone.bn1.weight.abs().double())
    for energy, value in ((layer.ce.off_diagonal_before, before), (layer.ce.off_diagonal_after, after)):
        covariance = torch.cov(value.double().transpose(0, 1).flatten(1), correction=0)
        assert energy == pytest.approx(off_diagonal_energy(covariance[None]), rel=1e-4)  # d = C = 16: one group
    assert layer.ce.lam == pytest.approx(torch.sigmoid(backbone.ce1.theta).item())
    assert_agree(layers['output.2'].contribution, outputs[2].relu().mean((0, 2, 3)).double(), 1e-5)

    row = layer.measures(relative_threshold=0.5, absolute_threshold=0.1)
    contribution = layer.contribution
    assert row['inhibited_relative'] == (contribution <= 0.5 * contribution.mean()).double().mean()
    assert row['inhibited_absolute'] == (contribution <= 0.1).double().mean()
    assert row['entropy_before'] == normalized_entropy(layer.ce.contribution_before)
    assert (layer.ce.gate < row['gate_5']).double().mean() == pytest.approx(0.05, abs=0.02)
    assert (layer.ce.gate < row['gate_95']).double().mean() == pytest.approx(0.95, abs=0.02)


def test_gate_is_the_one_that_ce_applies():
    """With lambda = 0 and s = 1 the block is its gate."""
    backbone, x = randomize(CEResNet(**SMALL)).eval(), images()
    with torch.no_grad():
        backbone.ce1.theta.fill_(-100)
        backbone.ce1.ir.running_scale.fill_(1)
        before = backbone.norm1(backbone.conv1(x))
        expected = backbone.ce1(before)[:, :, 5, 5] / before[:, :, 5, 5]
    assert_agree(analyze_channels(backbone, [x])['bn1'].ce.gate, expected, 1e-4)


def test_ce_at_other_places():
    x = images(2)
    second = randomize(CEResNet(depth=50, base_channels=8, ce_position='after_norm2', stem_with_ce=False))
    slots = [name for name, layer in analyze_channels(second, [x]).items() if layer.ce is not None]
    assert slots[:2] == ['layer1.0.bn2', 'layer1.1.bn2'] and all(name.endswith('bn2') for name in slots)
    plugin = dict(cfg=dict(type='ChannelEquilibrium'), stages=(True, False, False, False), position='after_conv3')
    layers = analyze_channels(ResNet(depth=50, base_channels=8, plugins=[plugin]), [x])
    assert [name for name, layer in layers.items() if layer.ce] == [f'layer1.{i}.bn3' for i in range(3)]
    mobile = analyze_channels(randomize(CEMobileNetV2(widen_factor=0.25)), [x])
    assert mobile['layer1.0.linear_conv.bn'].ce is not None and mobile['conv1.bn'].ce is None


class Interruption(Exception):
    pass


def interrupted(x):
    yield x
    raise Interruption


@pytest.mark.parametrize('breaks', [False, True])
def test_changes_nothing(breaks):
    backbone, x = randomize(CEResNet(norm_eval=False, frozen_stages=1, **SMALL)).train(), images()
    modes = [m.training for m in backbone.modules()]
    state = {key: t.clone() for key, t in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    if breaks:
        with pytest.raises(Interruption):
            analyze_channels(backbone, interrupted(x))
    else:
        analyze_channels(backbone, [x])
    assert [m.training for m in backbone.modules()] == modes
    assert not any(m._forward_hooks for m in backbone.modules())
    assert all(torch.equal(t, state[key]) for key, t in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_nothing_to_measure():
    with pytest.raises(ValueError, match='no image to measure with'):
        analyze_channels(ResNet(**SMALL), [])
    with pytest.raises(ValueError, match=r'no norm over \(N, C, H, W\) to measure'):
        analyze_channels(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), [images(1)])
