"""The other backbones on the same CE slot, the positions, and CE as a plugin of mmdet's own ResNet."""

from __future__ import annotations

import pytest
import torch
from mmdet.models import ResNet
from mmdet.registry import MODELS
from utils import assert_agree, randomize

from mmdet_ce import CEMobileNetV2, CEResNet

FAMILY = [
    ('CEResNet', 'ResNet', dict(depth=18, base_channels=16)),
    ('CEResNetV1d', 'ResNetV1d', dict(depth=50, base_channels=16, stem_channels=16)),
    ('CEResNeXt', 'ResNeXt', dict(depth=50, groups=4, base_width=4, base_channels=16)),
    ('CEMobileNetV2', 'MobileNetV2', dict(widen_factor=0.5)),
]


def build(name, **kwargs):
    return MODELS.build(dict(type=name, **kwargs))


@pytest.mark.parametrize('name, parent, kwargs', FAMILY)
def test_plain_weights_load_with_exactly_ce_missing(name, parent, kwargs):
    plain = randomize(build(parent, **kwargs))
    ours = build(name, ce_cfg=dict(num_channels=16, identity_start=True), **kwargs)
    result = ours.load_state_dict(plain.state_dict(), strict=False)
    names = tuple(f'{layer}.' for layer, _ in ours.named_ce())
    assert names and not result.unexpected_keys and all(key.startswith(names) for key in result.missing_keys)
    x = torch.randn(1, 3, 48, 64)
    plain.eval(), ours.eval()
    for a, b in zip(ours(x), plain(x)):
        assert_agree(a, b, 1e-5)


@pytest.mark.parametrize('name, parent, kwargs', FAMILY)
def test_modes_gradients_and_checkpointing(name, parent, kwargs):
    ours = randomize(build(name, norm_eval=False, **kwargs)).train()
    checkpointed = build(name, norm_eval=False, with_cp=True, **kwargs).train()
    checkpointed.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 48, 64)
    for backbone in (ours, checkpointed):
        sum(out.square().mean() for out in backbone(x.clone().requires_grad_())).backward()
    for (key, a), b in zip(checkpointed.named_parameters(), ours.parameters()):
        assert_agree(a.grad, b.grad, 1e-4, key)
    for (layer, a), (_, b) in zip(checkpointed.named_ce(), ours.named_ce()):
        assert all(torch.equal(p, q) for p, q in zip(a.buffers(), b.buffers())), f'{layer} was updated twice'
    assert all(ce.training for _, ce in ours.named_ce())
    ours.norm_eval = True
    assert not any(ce.training for _, ce in ours.train().named_ce())
    ours.ce_eval = False
    assert all(ce.training for _, ce in ours.train().named_ce())


def test_ce_mobilenet_v2_places_ce_after_each_projection():
    backbone = CEMobileNetV2()
    layers = dict(backbone.named_ce())
    assert len(layers) == 17 and 'layer1.0.ce' in layers
    assert [layers[f'layer{i}.0.ce'].group_size for i in range(1, 8)] == [16, 8, 16, 16, 16, 16, 16]
    backbone = CEMobileNetV2(stage_with_ce=(False,) * 6 + (True,))
    assert [name for name, _ in backbone.named_ce()] == ['layer7.0.ce']
    block = randomize(backbone.layer7[0]).double().eval()
    x = torch.randn(1, block.expand_conv.in_channels, 5, 5, dtype=torch.float64)
    assert_agree(block(x), block.ce(block.linear_conv(block.depthwise_conv(block.expand_conv(x)))), 1e-9)
    with pytest.raises(ValueError, match='needs True or False for each of the 7 stages, got'):
        CEMobileNetV2(stage_with_ce=(True,) * 4)


def test_frozen_stages_of_mobilenet_freeze_their_ce():
    backbone = CEMobileNetV2(frozen_stages=2).train()
    frozen = {name: not ce.training for name, ce in backbone.named_ce()}
    assert all(value == name.startswith(('layer1.', 'layer2.')) for name, value in frozen.items())


def test_position_after_the_second_norm():
    backbone = CEResNet(depth=50, base_channels=16, ce_position='after_norm2')
    block = randomize(backbone.layer1[1]).double().eval()
    assert block.ce.in_channels == 16
    x = torch.randn(2, 64, 6, 5, dtype=torch.float64)
    out = block.relu(block.norm1(block.conv1(x)))
    out = block.relu(block.ce(block.norm2(block.conv2(out))))
    assert_agree(block(x), block.relu(x + block.norm3(block.conv3(out))), 1e-9)


def test_position_after_the_second_norm_zeroes_the_last_one():
    backbone = CEResNet(depth=50, base_channels=16, ce_position='after_norm2')
    backbone.init_weights()
    assert not backbone.layer1[0].norm3.weight.any()


def test_bad_positions():
    with pytest.raises(ValueError, match="must be 'after_norm3' or 'after_norm2', got 'after_norm1'"):
        CEResNet(depth=50, ce_position='after_norm1')
    with pytest.raises(ValueError, match='needs bottlenecks, and depth 18 has none'):
        CEResNet(depth=18, ce_position='after_norm2')


@pytest.mark.parametrize('training', [True, False])
def test_plugin_gives_the_same_numbers(training):
    """CE as a stock plugin of mmdet's own ResNet, against CEResNet without a stem CE."""
    stages = (True, True, True, False)
    plugin = dict(cfg=dict(type='ChannelEquilibrium', num_channels=16), stages=stages, position='after_conv3')
    stock = ResNet(depth=50, base_channels=16, plugins=[plugin], norm_eval=False)
    ours = randomize(CEResNet(depth=50, base_channels=16, stem_with_ce=False, norm_eval=False))
    renamed = {key.replace('.ce.', '.channel_equilibrium.'): t for key, t in ours.state_dict().items()}
    stock.load_state_dict(renamed, strict=True)
    x = torch.randn(2, 3, 64, 64)
    stock.train(training), ours.train(training)
    for a, b in zip(stock.double()(x.double()), ours.double()(x.double())):
        assert_agree(a, b, 1e-6)
