"""CEResNet as the released network and as a backbone of mmdet; its arguments."""

from __future__ import annotations

import re

import pytest
import torch
from mmdet.registry import MODELS
from released import assert_network_agrees, network_state
from utils import randomize

from mmdet_ce import CEResNet, ChannelEquilibrium
from mmdet_ce.checkpoints.official import convert_official_state_dict
from mmdet_ce.layers.block_end import block_end


@pytest.mark.parametrize('training', [False, True])
def test_network_agrees_with_released_code(training):
    backbone = CEResNet(depth=50, norm_eval=False)
    state = {f'module.{name}': value for name, value in network_state().items()}  # as DataParallel saves
    backbone.load_state_dict(convert_official_state_dict(dict(state_dict=state)), strict=True)
    assert_network_agrees(backbone.train(training), 'cpu', tolerance=1e-4, train_c5=5e-4)


@pytest.mark.parametrize('depth, blocks', [(18, 6), (34, 13), (50, 13), (101, 30), (152, 47)])
def test_every_depth_builds_from_the_registry(depth, blocks):
    with torch.device('meta'):
        layers = dict(MODELS.build(dict(type='CEResNet', depth=depth)).named_ce())
    assert len(layers) == 1 + blocks
    assert not any(name.startswith('layer4') for name in layers)
    assert layers.pop('ce1').group_size == 64
    assert {ce.group_size for ce in layers.values()} == {16}


@pytest.mark.parametrize('depth, norm, blocks_of_stage_4', [(18, 'bn2', 2), (50, 'bn3', 3)])
def test_zero_init_residual(depth, norm, blocks_of_stage_4):
    """By default the last norm of a block starts at zero in stage 4 alone, which has no CE."""

    def zeroed(**kwargs) -> list[bool]:
        backbone = CEResNet(depth=depth, base_channels=16, **kwargs)
        backbone.init_weights()
        return [not m.weight.any() for name, m in backbone.named_modules() if name.endswith(f'.{norm}')]

    assert all(zeroed(zero_init_residual=True))
    assert not any(zeroed(zero_init_residual=False))
    default = zeroed()
    assert default == [False] * (len(default) - blocks_of_stage_4) + [True] * blocks_of_stage_4


def test_deep_stem_applies_ce_between_norm_and_relu():
    backbone = randomize(CEResNet(depth=18, deep_stem=True, base_channels=16)).eval()
    seen = {}
    backbone.stem[-2].register_forward_hook(lambda m, i, o: seen.update(norm=o.clone()))
    backbone.ce1.register_forward_hook(lambda m, i, o: seen.update(ce_input=i[0].clone(), ce=o.clone()))
    backbone.maxpool.register_forward_hook(lambda m, i, o: seen.update(pooled=i[0].clone()))
    backbone(torch.randn(1, 3, 32, 32))
    assert torch.equal(seen['norm'], seen['ce_input'])
    assert torch.equal(seen['ce'].relu(), seen['pooled'])


class TenfoldBatchNorm(torch.nn.BatchNorm2d):
    """Its base class computes an affine map; the subclass computes something else."""

    def forward(self, x):
        return 10 * super().forward(x)


def test_a_norm_of_another_class_is_not_folded():
    ce = randomize(ChannelEquilibrium(16)).eval()
    norm = TenfoldBatchNorm(16).eval()
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(block_end(x, norm, ce), ce(norm(x)))


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(ce_eval='None'), "ce_eval must be True, False or None, got 'None'"),
        (dict(frozen_stage=1), "CEResNet has no argument 'frozen_stage'; did you mean 'frozen_stages'?"),
        (dict(num_iterations=8), 'write ce_cfg=dict(num_iterations=...)'),
        (dict(stage_with_ce=(True,)), 'stage_with_ce needs True or False for each of the 4 stages, got'),
        (dict(stage_with_ce=(True, True, 'yes', False)), 'stage_with_ce needs True or False for each of the 4 stages'),
        (dict(ce_cfg=16), 'ce_cfg must be a dict of arguments of ChannelEquilibrium, or None, got 16'),
        (dict(ce_cfg=dict(num_iterations=0)), 'num_iterations must be an integer of at least 1'),
        (dict(ce_position='after_norm1'), "must be 'after_norm3' or 'after_norm2', got 'after_norm1'"),
        (dict(ce_position='after_norm2'), 'needs bottlenecks, and depth 18 has none'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        MODELS.build(dict(type='CEResNet', depth=18, **arguments))
