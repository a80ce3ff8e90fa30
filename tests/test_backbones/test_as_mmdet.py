"""The backbones in the place of mmdet's: with CE off the same network, and what mmdet checks is checked first."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as every_module
from utils import assert_agree

from mmdet_ce import ChannelEquilibrium

SMALL = dict(depth=50, base_channels=4)
FAMILY = {
    'ResNet': dict(depth=18, base_channels=16),
    'ResNetV1d': dict(depth=50, base_channels=16, stem_channels=16),
    'ResNeXt': dict(depth=50, groups=4, base_width=4, base_channels=16),
    'MobileNetV2': dict(widen_factor=0.5),
}
FAMILY_CASES = pytest.mark.parametrize('name, arguments', FAMILY.items(), ids=FAMILY.keys())


def build(name: str, **kwargs) -> nn.Module:
    return MODELS.build(dict(type=name, **copy.deepcopy(kwargs)))  # mmdet takes things out of dcn and plugins


def build_both(name: str, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Return mmdet's backbone, and this project's with CE off, with the same weights from the same start."""
    both = []
    for kind in (dict(type=name), dict(type=f'CE{name}', ce_cfg=None)):
        torch.manual_seed(3)
        both.append(MODELS.build({**kind, **copy.deepcopy(kwargs)}))
        both[-1].init_weights()
    return both[0], both[1]


# ---- CE off ----


@FAMILY_CASES
@pytest.mark.parametrize('zero_init', [{}, dict(zero_init_residual=True), dict(zero_init_residual=False)], ids=str)
def test_the_random_start_is_mmdets(name, arguments, zero_init):
    """mmdet's ResNeXt zeroes no last norm, whatever it is told."""
    if name == 'MobileNetV2' and zero_init:
        pytest.skip('MobileNetV2 has no zero_init_residual')
    theirs, ours = build_both(name, **arguments, **zero_init)
    state = theirs.state_dict()
    assert [*state] == [*ours.state_dict()]
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


MIDDLE = (False, True, True, False)


def context(position: str, stages=MIDDLE, **kwargs) -> dict:
    return dict(cfg=dict(type='ContextBlock', ratio=1 / 16, **kwargs), stages=stages, position=position)


ATTENTION = dict(type='GeneralizedAttention', spatial_range=-1, num_heads=8, attention_type='0010', kv_stride=2)
ARGUMENTS = [
    ('ResNet', dict(depth=18, base_channels=4, norm_eval=False)),
    ('ResNet', dict(depth=34, base_channels=4, style='caffe', out_indices=(0, 2))),
    ('ResNet', dict(SMALL, style='caffe', norm_eval=False)),
    ('ResNet', dict(SMALL, base_channels=1, out_indices=(0, 1, 2))),
    ('ResNet', dict(SMALL, stem_channels=3, base_channels=2, in_channels=3)),
    ('ResNet', dict(SMALL, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,))),
    ('ResNet', dict(SMALL, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))),
    ('ResNet', dict(SMALL, deep_stem=True, frozen_stages=0)),
    ('ResNet', dict(SMALL, avg_down=True, frozen_stages=2, norm_eval=False)),
    ('ResNet', dict(SMALL, frozen_stages=4)),
    ('ResNet', dict(SMALL, norm_cfg=dict(type='GN', num_groups=2, requires_grad=True))),
    ('ResNet', dict(SMALL, norm_cfg=dict(type='BN', requires_grad=False))),
    ('ResNet', dict(SMALL, conv_cfg=dict(type='ConvWS'))),
    ('ResNet', dict(SMALL, with_cp=True)),
    ('ResNet', dict(SMALL, dcn=dict(type='DCN', deform_groups=1, fallback_on_stride=False), stage_with_dcn=MIDDLE)),
    ('ResNet', dict(SMALL, dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=True), stage_with_dcn=MIDDLE)),
    ('ResNet', dict(SMALL, base_channels=8, plugins=[
        dict(cfg=ATTENTION, stages=(False, True, True, True), position='after_conv2'),
        dict(cfg=dict(type='NonLocal2d'), position='after_conv2'), context('after_conv3')])),
    ('ResNet', dict(SMALL, base_channels=8, plugins=[
        context('after_conv1', postfix=0), context('after_conv3', postfix=1), context('after_conv3', postfix=2)])),
    ('ResNetV1d', dict(depth=50, base_channels=2, frozen_stages=1)),
    ('ResNetV1d', dict(depth=50, base_channels=4, stem_channels=6, norm_eval=False)),
    ('ResNeXt', dict(SMALL, base_channels=8, groups=4, base_width=2, norm_eval=False)),
    ('ResNeXt', dict(SMALL, groups=2, frozen_stages=1, style='caffe')),
    ('ResNeXt', dict(SMALL, groups=1, with_cp=True)),
    ('ResNeXt', dict(SMALL, base_channels=8, groups=2, plugins=[context('after_conv2')])),
    ('ResNeXt', dict(SMALL, base_channels=8, groups=4, dcn=dict(type='DCN', deform_groups=1), stage_with_dcn=MIDDLE)),
    ('MobileNetV2', dict(widen_factor=0.25, out_indices=range(8))),
    ('MobileNetV2', dict(widen_factor=1.25, out_indices=(0, 2, 4), act_cfg=dict(type='ReLU'))),
    ('MobileNetV2', dict(widen_factor=0.25, norm_cfg=dict(type='GN', num_groups=2))),
    ('MobileNetV2', dict(widen_factor=0.25, norm_cfg=None)),
    ('MobileNetV2', dict(widen_factor=0.25, frozen_stages=3)),
    ('MobileNetV2', dict(widen_factor=0.25, norm_eval=True, with_cp=True)),
]  # fmt: skip


@pytest.mark.parametrize('name, arguments', ARGUMENTS, ids=[f'{n}-{"-".join(map(str, a))}' for n, a in ARGUMENTS])
def test_the_network_is_mmdets(name, arguments):
    """Names, kinds, modes and what is frozen; outputs and gradients, in evaluation and in training; running values."""
    theirs, ours = build_both(name, **arguments)
    x = torch.randn(2, 3, 64, 64)
    for mode in (False, True):
        theirs.train(mode), ours.train(mode)
        modules = dict(theirs.named_modules())
        assert [key for key, _ in ours.named_modules()] == [*modules]
        for key, module in ours.named_modules():
            assert isinstance(module, type(modules[key])) or not key, key
            assert module.extra_repr() == modules[key].extra_repr() and module.training == modules[key].training, key
        outs = [model(x.clone()) for model in (theirs, ours)]
        assert len(outs[0]) == len(outs[1]) and all(torch.equal(a, b) for a, b in zip(*outs))
    if any(p.requires_grad for p in theirs.parameters()):
        for levels in outs:
            sum(level.square().mean() for level in levels).backward()
    for (key, p), q in zip(theirs.named_parameters(), ours.parameters()):
        assert p.requires_grad == q.requires_grad and (p.grad is None) == (q.grad is None), key
        if p.grad is not None:  # to the bit, but what is added up in another order under checkpointing
            assert_agree(q.grad, p.grad, 1e-4 if arguments.get('with_cp') else 0.0, key)
    assert all(torch.equal(a, b) for a, b in zip(theirs.buffers(), ours.buffers()))


@FAMILY_CASES
def test_checkpointing_is_mmdets(name, arguments):
    """It moves the running values of a block's norms again while it recomputes the block."""
    theirs, ours = build_both(name, **arguments, with_cp=True, norm_eval=False)
    x = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        model.train()
        levels = model(x.clone().requires_grad_())
        sum(level.square().mean() for level in levels).backward()
    assert all(torch.equal(a, b) for a, b in zip(theirs.buffers(), ours.buffers()))
    for (key, p), q in zip(theirs.named_parameters(), ours.parameters()):
        assert_agree(q.grad, p.grad, 1e-4, key)


# ---- arguments that mmdet refuses ----


BAD_ARGUMENTS = [
    ('ResNet', dict(depth=20)),
    ('ResNet', dict(SMALL, num_stages=0)),
    ('ResNet', dict(SMALL, num_stages=5)),
    ('ResNet', dict(SMALL, num_stages=3)),
    ('ResNet', dict(SMALL, strides=(1,), dilations=(1, 1), num_stages=3)),
    ('ResNet', dict(SMALL, out_indices=(4,))),
    ('ResNet', dict(SMALL, style='tensorflow')),
    ('ResNet', dict(SMALL, pretrained=0)),
    ('ResNet', dict(SMALL, pretrained='a.pth', init_cfg=dict(type='Pretrained', checkpoint='a.pth'))),
    ('ResNet', dict(SMALL, dcn=dict(type='DCN'), stage_with_dcn=(True,))),
    ('ResNet', dict(SMALL, dcn=dict(type='DCN'), stage_with_dcn=(True,) * 4, conv_cfg=dict(type='Conv2d'))),
    ('ResNet', dict(SMALL, plugins=[context('after_conv3', stages=(True,) * 3)])),
    ('ResNet', dict(SMALL, plugins=[context('after_conv4')])),
    ('ResNet', dict(SMALL, plugins=[context('after_conv3'), context('after_conv3')])),
    ('ResNet', dict(SMALL, plugins=[dict(cfg=dict(type='WrongPlugin'), position='after_conv3')])),
    ('ResNet', dict(depth=18, dcn=dict(type='DCN'), stage_with_dcn=(True,) * 4)),
    ('ResNet', dict(depth=18, plugins=[context('after_conv3')])),
    ('ResNet', dict(SMALL, no_such_argument=1)),
    ('ResNetV1d', dict(SMALL, deep_stem=True)),
    ('ResNeXt', dict(depth=18)),
    ('ResNeXt', dict(SMALL, num_stages=5)),
    ('ResNeXt', dict(SMALL, groups=4, style='tensorflow')),
    ('MobileNetV2', dict(frozen_stages=8)),
    ('MobileNetV2', dict(out_indices=[8])),
    ('MobileNetV2', dict(pretrained=0)),
]  # fmt: skip


@pytest.mark.parametrize(
    'name, arguments', BAD_ARGUMENTS, ids=[f'{n}-{"-".join(map(str, a))}' for n, a in BAD_ARGUMENTS]
)
@pytest.mark.parametrize('ce', [dict(ce_cfg=None), dict()], ids=['off', 'on'])
def test_what_mmdet_refuses_is_refused_as_mmdet_does(name, arguments, ce):
    with pytest.raises(Exception) as theirs:
        MODELS.get(name)(**copy.deepcopy(arguments))
    with pytest.raises(theirs.type) as ours:
        MODELS.get(f'CE{name}')(**ce, **copy.deepcopy(arguments))
    if theirs.type not in (KeyError, TypeError):  # these name the class
        assert str(ours.value) == str(theirs.value)


# ---- tensors without values, and hooks ----


@pytest.mark.parametrize('name', ['ResNet', 'MobileNetV2'])
def test_fake_tensors(name):
    """With fake weights, in training too, and with real ones."""
    arguments = FAMILY[name]
    with FakeTensorMode():
        backbone = build(f'CE{name}', norm_eval=True, **arguments)
        backbone.eval()(torch.empty(1, 3, 64, 64))
        sum(out.sum() for out in backbone.train()(torch.empty(2, 3, 64, 64))).backward()
        assert all(p.grad.shape == p.shape for p in backbone.parameters())
    real = build(f'CE{name}', **arguments).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = real(torch.empty(1, 3, 64, 64))
    assert [out.shape for out in fake] == [out.shape for out in real(torch.rand(1, 3, 64, 64))]


@FAMILY_CASES
@pytest.mark.parametrize('register', ['register_module_forward_hook', 'register_module_forward_pre_hook'])
def test_global_hooks_see_every_module(name, arguments, register):
    """Every norm above all, which CE would take into itself, and the output stays what it was."""
    backbone = build(f'CE{name}', **arguments).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected, seen = backbone(x), set()
    handle = getattr(every_module, register)(lambda module, *_: seen.add(module))
    try:
        outs = backbone(x)
        ours, seen = seen, set()
        plain = build(name, **arguments).double()
        plain.eval()
        plain(x)
    finally:
        handle.remove()
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(outs, expected))
    named = {key for key, module in backbone.named_modules() if module in ours}
    assert {key for key, module in plain.named_modules() if module in seen} - named <= {'stem'}, (
        'CE is within a deep stem'
    )
    assert {module for module in backbone.modules() if isinstance(module, (nn.BatchNorm2d, ChannelEquilibrium))} <= ours


def test_a_hook_on_a_whole_projection_of_mobilenet_is_called():
    backbone = build('CEMobileNetV2', **FAMILY['MobileNetV2']).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected, seen = backbone(x), []
    backbone.layer3[1].linear_conv.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(backbone(x), expected)) and len(seen) == 1
