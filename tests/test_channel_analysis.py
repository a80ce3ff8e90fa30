"""Channel analysis: measures by hand, what is measured of which layer, and nothing changed by measuring."""

from __future__ import annotations

import pytest
import torch
from mmdet.models import ResNet
from utils import randomize

from mmdet_ce import CEMobileNetV2, CEResNet
from mmdet_ce.channel_analysis import inhibited_share, off_diagonal_energy, watch_channels

SMALL = dict(depth=18, base_channels=16)


def images(count=4, size=48):
    return torch.randn(count, 3, size, size)


@torch.no_grad()
def analyze(backbone, *batches):
    backbone.eval()  # mmdet's ResNet returns None
    with watch_channels(backbone) as layers:
        for batch in batches:
            backbone(batch)
    return layers


def test_inhibited_share():
    assert inhibited_share(torch.tensor([0.0, 0.1, 0.9, 3.0]), 0.1) == 0.5
    assert inhibited_share(torch.zeros(4)) == 1  # a layer that never responds


def test_off_diagonal_energy():
    same, alone = torch.ones(2, 2), torch.diag(torch.tensor([4.0, 1.0]))
    assert off_diagonal_energy(same[None]) == pytest.approx(0.5)
    assert off_diagonal_energy(alone[None]) == 0
    assert off_diagonal_energy(torch.stack([same, alone, torch.zeros(2, 2)])) == pytest.approx(0.5 / 3)


def test_layers_pair_up():
    plain = analyze(ResNet(**SMALL), images())
    ce = analyze(randomize(CEResNet(**SMALL)), images())
    slots = ['bn1', *(f'layer{stage}.{block}.bn2' for stage in (1, 2, 3) for block in (0, 1))]
    assert list(plain) == list(ce)
    assert [name for name, layer in ce.items() if layer.ce] == slots
    assert not any(layer.ce for layer in plain.values())
    assert 'layer4.1.bn1' in plain and not any('downsample' in name for name in plain)


def test_values_of_a_layer_by_hand():
    backbone, x = randomize(CEResNet(**SMALL)).eval(), images()
    layer = analyze(backbone, *x.split([3, 1]))['bn1']
    with torch.no_grad():
        before = backbone.norm1(backbone.conv1(x))
        after = backbone.ce1(before)
    row = layer.measures(threshold=0.5)
    for key, value in (('inhibited_before', before), ('inhibited', after)):
        contribution = value.relu().mean((0, 2, 3))
        assert row[key] == (contribution <= 0.5 * contribution.mean()).double().mean() > 0
    assert layer.contribution.tolist() == pytest.approx(after.relu().mean((0, 2, 3)).tolist(), rel=1e-5)
    assert row['lambda'] == pytest.approx(torch.sigmoid(backbone.ce1.theta).item())
    for key, value in (('off_diagonal_before', before), ('off_diagonal_after', after)):
        covariance = torch.cov(value.double().transpose(0, 1).flatten(1), correction=0)
        assert row[key] == pytest.approx(off_diagonal_energy(covariance[None]), rel=1e-4)  # d = C = 16: one group


def test_ce_at_other_places():
    x = images(2)
    second = randomize(CEResNet(depth=50, base_channels=8, ce_position='after_norm2', stem_with_ce=False))
    slots = [name for name, layer in analyze(second, x).items() if layer.ce]
    assert slots[:2] == ['layer1.0.bn2', 'layer1.1.bn2'] and all(name.endswith('bn2') for name in slots)
    plugin = dict(cfg=dict(type='ChannelEquilibrium'), stages=(True, False, False, False), position='after_conv3')
    layers = analyze(ResNet(depth=50, base_channels=8, plugins=[plugin]), x)
    assert [name for name, layer in layers.items() if layer.ce] == [f'layer1.{i}.bn3' for i in range(3)]
    mobile = analyze(randomize(CEMobileNetV2(widen_factor=0.25)), x)
    assert mobile['layer1.0.linear_conv.bn'].ce and not mobile['conv1.bn'].ce


def test_changes_nothing_where_it_is_interrupted_too():
    backbone = randomize(CEResNet(norm_eval=True, **SMALL)).train()
    state = {key: t.clone() for key, t in backbone.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), watch_channels(backbone):
        backbone(images())
        raise KeyboardInterrupt
    assert not any(m._forward_hooks for m in backbone.modules())
    assert all(torch.equal(t, state[key]) for key, t in backbone.state_dict().items())
