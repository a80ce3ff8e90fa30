"""CEResNet against mmdet's ResNet and against the released network; its arguments."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from utils import assert_agree, randomize

from mmdet_ce import CEResNet, ChannelEquilibrium
from mmdet_ce.backbones.ce_resnet import norm_ce
from mmdet_ce.checkpoints.official import convert_official_state_dict

TINY = dict(base_channels=16)


def ce_names(backbone):
    return [name for name, _ in backbone.named_ce()]


# ---- as the released network ----


def test_default_placement_is_the_released_one(golden):
    official = json.loads((golden / 'official_resnetv1ce50_keys.json').read_text())
    ours = CEResNet(depth=50).state_dict()
    converted = convert_official_state_dict({k: torch.empty(v) for k, v in official.items()})
    assert converted.keys() == ours.keys()
    assert {k: tuple(v.shape) for k, v in converted.items()} == {k: tuple(v.shape) for k, v in ours.items()}


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_network_agrees_with_released_code(golden, fill, mode):
    official = json.loads((golden / 'official_resnetv1ce50_keys.json').read_text())
    state = {f'module.{k}': torch.from_numpy(np.asarray(fill(k, v))) for k, v in official.items()}
    backbone = CEResNet(depth=50, norm_eval=False)
    backbone.load_state_dict(convert_official_state_dict({'state_dict': state}))
    backbone.train(mode == 'train')
    data = np.load(golden / f'ce_resnet50_{mode}.npz')
    with torch.no_grad():
        outs = backbone(torch.from_numpy(data['x']))
    for level, out in zip(('c2', 'c3', 'c4', 'c5'), outs):
        # Stage 4's norms train on 12 positions here: changing the input by 1e-7 moves c5 by 2e-4, and the golden c5
        # itself lies 2.2e-4 from this network in float64.
        assert_agree(out, data[level], 5e-4 if (mode, level) == ('train', 'c5') else 1e-4, level)


# ---- as mmdet's ResNet ----


@pytest.mark.parametrize('depth, blocks', [(18, 6), (34, 13), (50, 13), (101, 30), (152, 47)])
def test_every_depth_builds_from_the_registry(depth, blocks):
    with torch.device('meta'):
        backbone = MODELS.build(dict(type='CEResNet', depth=depth))
    assert len(ce_names(backbone)) == 1 + blocks
    assert not any(name.startswith('layer4') for name in ce_names(backbone))
    assert backbone.ce1.group_size == 64
    assert {ce.group_size for name, ce in backbone.named_ce() if name != 'ce1'} == {16}


@pytest.mark.parametrize('depth', [18, 50])
def test_switched_off_by_its_places_it_is_mmdets(depth):
    torch.manual_seed(1)
    plain = MODELS.build(dict(type='ResNet', depth=depth, **TINY))
    plain.init_weights()
    torch.manual_seed(1)
    backbone = CEResNet(depth=depth, stage_with_ce=(False,) * 4, stem_with_ce=False, **TINY)
    backbone.init_weights()
    assert [*plain.state_dict()] == [*backbone.state_dict()]
    x = torch.randn(2, 3, 64, 64)
    plain.train(), backbone.train()
    assert all(torch.equal(a, b) for a, b in zip(plain(x), backbone(x)))


@pytest.mark.parametrize('depth, norm', [(18, 'norm2'), (50, 'norm3')])
def test_zero_init_residual(depth, norm):
    def zeroed(**kwargs):
        backbone = CEResNet(depth=depth, **kwargs, **TINY)
        backbone.init_weights()
        return [
            not getattr(block, norm).weight.any() for layer in backbone.res_layers for block in getattr(backbone, layer)
        ]

    assert all(zeroed(zero_init_residual=True))
    assert not any(zeroed(zero_init_residual=False))
    default = zeroed()
    stage_4 = {18: 2, 50: 3}[depth]
    assert default == [False] * (len(default) - stage_4) + [True] * stage_4, 'stage 4 alone has no CE'


def test_deep_stem_applies_ce_between_norm_and_relu():
    backbone = randomize(CEResNet(depth=18, deep_stem=True, **TINY)).eval()
    seen = {}
    backbone.stem[-2].register_forward_hook(lambda m, i, o: seen.update(norm=o.clone()))
    backbone.ce1.register_forward_hook(lambda m, i, o: seen.update(ce_input=i[0].clone(), ce=o.clone()))
    backbone.maxpool.register_forward_hook(lambda m, i, o: seen.update(pooled=i[0].clone()))
    backbone(torch.randn(1, 3, 32, 32))
    assert torch.equal(seen['norm'], seen['ce_input'])
    assert torch.equal(seen['ce'].relu(), seen['pooled'])


# ---- norms folded into CE, plugins ----


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('ce_eval', [True, False])
def test_hooked_layers_are_called_in_turn_and_give_the_same(depth, ce_eval):
    """Without hooks an evaluated norm is folded into CE; with one on either layer both run on their own."""
    backbone = randomize(CEResNet(depth=depth, ce_eval=ce_eval, **TINY)).double().train()
    hooked = copy.deepcopy(backbone)
    seen = {}
    hooked.layer1[0].ce.register_forward_hook(lambda m, i, o: seen.update(ce=i[0].clone()))
    last_norm = hooked.layer1[0].norm2 if depth == 18 else hooked.layer1[0].norm3
    last_norm.register_forward_hook(lambda m, i, o: seen.update(norm=o.clone()))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    outs = [model(x) for model in (backbone, hooked)]
    for a, b in zip(*outs):
        assert_agree(a, b, 1e-9)
    assert torch.equal(seen['norm'], seen['ce'])
    for model_outs in outs:
        sum(o.square().mean() for o in model_outs).backward()
    for (name, a), b in zip(backbone.named_parameters(), hooked.parameters()):
        assert_agree(a.grad, b.grad, 1e-8, name)


@pytest.mark.parametrize('path', ['ce1', 'layer3.1.ce', 'layer1.0', 'layer1', 'layer2.0.norm2'])
@pytest.mark.parametrize('kind', ['register_full_backward_hook', 'register_full_backward_pre_hook'])
def test_backward_hooks_on_ce_and_on_what_holds_it(path, kind):
    """They make views, which the addition of the shortcut and the ReLU may not change in place."""
    backbone, seen = randomize(CEResNet(depth=18, **TINY)).double().train(), []
    hooked = copy.deepcopy(backbone)
    getattr(hooked.get_submodule(path), kind)(lambda *_: seen.append(path))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for model in (backbone, hooked):
        sum(out.square().mean() for out in model(x)).backward()
    assert seen
    for (name, a), b in zip(hooked.named_parameters(), backbone.parameters()):
        assert_agree(a.grad, b.grad, 1e-8, name)


class TenfoldBatchNorm(torch.nn.BatchNorm2d):
    """Its base class computes an affine map; the subclass computes something else."""

    def forward(self, x):
        return 10 * super().forward(x)


def test_a_norm_of_another_class_is_not_folded():
    ce = randomize(ChannelEquilibrium(16)).eval()
    norm = TenfoldBatchNorm(16).eval()
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(norm_ce(norm, ce, x), ce(norm(x)))


def test_positional_arguments_as_in_mmdet():
    assert CEResNet(18, 1, 16, 16, 4).conv1.weight.shape == (16, 1, 7, 7)


# ---- bad input ----


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(ce_eval='no'), "ce_eval must be True, False or None, got 'no'"),
        (dict(ce_eval='None'), "ce_eval must be True, False or None, got 'None'"),
        (dict(stage_with_ces=(True,)), "CEResNet has no argument 'stage_with_ces'; did you mean 'stage_with_ce'?"),
        (dict(frozen_stage=1), "CEResNet has no argument 'frozen_stage'; did you mean 'frozen_stages'?"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        MODELS.build(dict(type='CEResNet', depth=18, **arguments))


@pytest.mark.parametrize('stages', [(True,), (True,) * 5, 'True', 4, {True}, (True, True, 'yes', False)])
def test_bad_stage_with_ce(stages):
    with pytest.raises(ValueError, match='stage_with_ce needs True or False for each of the 4 stages, got'):
        CEResNet(depth=18, stage_with_ce=stages)


def test_bad_ce_cfg():
    with pytest.raises(ValueError, match='ce_cfg must be a dict of arguments of ChannelEquilibrium, or None, got 16'):
        CEResNet(depth=18, ce_cfg=16)
    with pytest.raises(ValueError, match='num_iterations must be an integer of at least 1'):
        MODELS.build(dict(type='CEResNet', depth=18, ce_cfg=dict(num_iterations=0)))
