"""The other backbones on the same CE slot, the positions, and CE as a plugin of mmdet's own ResNet."""

from __future__ import annotations

import pytest
import torch
from mmdet.models import ResNet
from mmdet.registry import MODELS
from utils import FAMILY, assert_agree, randomize

from mmdet_ce import CEMobileNetV2, CEResNet


@pytest.mark.parametrize('name, arguments', FAMILY)
def test_plain_weights_load_with_exactly_ce_missing(name, arguments):
    plain = randomize(MODELS.build(dict(type=name, **arguments)))
    ours = MODELS.build(dict(type=f'CE{name}', ce_cfg=dict(num_channels=16, identity_start=True), **arguments))
    result = ours.load_state_dict(plain.state_dict(), strict=False)
    names = tuple(f'{layer}.' for layer, _ in ours.named_ce())
    assert names and not result.unexpected_keys and all(key.startswith(names) for key in result.missing_keys)
    x = torch.randn(1, 3, 48, 64)
    plain.eval()
    for a, b in zip(ours.eval()(x), plain(x)):
        assert_agree(a, b, 1e-5)


def test_ce_mobilenet_v2_places_ce_after_each_projection():
    layers = dict(CEMobileNetV2().named_ce())
    assert len(layers) == 17 and 'layer1.0.ce' in layers
    assert [layers[f'layer{i}.0.ce'].group_size for i in range(1, 8)] == [16, 8, 16, 16, 16, 16, 16]
    backbone = CEMobileNetV2(stage_with_ce=(False,) * 6 + (True,))
    assert [name for name, _ in backbone.named_ce()] == ['layer7.0.ce']
    block = randomize(backbone.layer7[0]).double().eval()
    x = torch.randn(1, block.expand_conv.in_channels, 5, 5, dtype=torch.float64)
    assert_agree(block(x), block.ce(block.linear_conv(block.depthwise_conv(block.expand_conv(x)))), 1e-9)


def test_frozen_stages_of_mobilenet_freeze_their_ce():
    backbone = CEMobileNetV2(frozen_stages=2).train()
    for name, ce in backbone.named_ce():
        assert ce.training is not name.startswith(('layer1.', 'layer2.')), name


def test_position_after_the_second_norm():
    backbone = CEResNet(depth=50, base_channels=16, ce_position='after_norm2')
    backbone.init_weights()
    assert not backbone.layer1[0].norm3.weight.any(), 'no CE after it: it starts at zero as in mmdet'
    block = randomize(backbone.layer1[1]).double().eval()
    assert block.ce.in_channels == 16
    x = torch.randn(2, 64, 6, 5, dtype=torch.float64)
    out = block.relu(block.norm1(block.conv1(x)))
    out = block.relu(block.ce(block.norm2(block.conv2(out))))
    assert_agree(block(x), block.relu(x + block.norm3(block.conv3(out))), 1e-9)


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
    stock.train(training)
    ours.train(training)
    for a, b in zip(stock.double()(x.double()), ours.double()(x.double())):
        assert_agree(a, b, 1e-6)
