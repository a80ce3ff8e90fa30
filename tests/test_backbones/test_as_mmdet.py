"""The backbones in the place of mmdet's: with CE off the same network; hooks are called as in mmdet's."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn
from torch.nn.modules import module as every_module
from utils import assert_agree, randomize

SMALL = dict(depth=50, base_channels=4)
MIDDLE = (False, True, True, False)


def build_both(name: str, arguments: dict) -> tuple[nn.Module, nn.Module]:
    """Return mmdet's backbone, and this project's with CE off, each with the weights that seed 3 gives it."""
    both = []
    for kind in (dict(type=name), dict(type=f'CE{name}', ce_cfg=None)):
        torch.manual_seed(3)
        both.append(MODELS.build({**kind, **copy.deepcopy(arguments)}))  # mmdet takes things out of dcn and plugins
        both[-1].init_weights()
    return both[0], both[1]


def context(position: str, **kwargs) -> dict:
    return dict(cfg=dict(type='ContextBlock', ratio=1 / 16, **kwargs), stages=MIDDLE, position=position)


ARGUMENTS = [
    ('ResNet', dict(depth=18, base_channels=4, norm_eval=False)),
    ('ResNet', dict(depth=18, base_channels=4, zero_init_residual=False)),
    ('ResNet', dict(SMALL, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), out_indices=(0, 2))),
    ('ResNet', dict(SMALL, deep_stem=True, frozen_stages=0, style='caffe')),
    ('ResNet', dict(SMALL, avg_down=True, frozen_stages=2, norm_eval=False)),
    ('ResNet', dict(SMALL, norm_cfg=dict(type='GN', num_groups=2, requires_grad=True))),
    ('ResNet', dict(SMALL, dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=True), stage_with_dcn=MIDDLE)),
    (
        'ResNet',
        dict(SMALL, base_channels=8, plugins=[context('after_conv1'), context('after_conv3', postfix=1)]),
    ),
    ('ResNetV1d', dict(depth=50, base_channels=4, stem_channels=6, norm_eval=False)),
    ('ResNeXt', dict(SMALL, base_channels=8, groups=4, base_width=2, plugins=[context('after_conv2')])),
    ('ResNeXt', dict(SMALL, groups=2, frozen_stages=1, dcn=dict(type='DCN', deform_groups=1), stage_with_dcn=MIDDLE)),
    ('MobileNetV2', dict(widen_factor=0.25, out_indices=range(8), norm_eval=True)),
    ('MobileNetV2', dict(widen_factor=0.25, norm_cfg=None, frozen_stages=3)),
]


@pytest.mark.parametrize('name, arguments', ARGUMENTS, ids=[f'{n}-{"-".join(a)}' for n, a in ARGUMENTS])
def test_with_ce_off_the_network_is_mmdets(name, arguments):
    """Random start, names, modes and what is frozen; outputs and gradients to the bit; running values."""
    theirs, ours = build_both(name, arguments)
    state = theirs.state_dict()
    assert [*state] == [*ours.state_dict()]
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    x = torch.randn(2, 3, 64, 64)
    for mode in (False, True):
        theirs.train(mode)  # mmdet's returns None
        ours.train(mode)
        outs = [model(x.clone()) for model in (theirs, ours)]
        assert len(outs[0]) == len(outs[1])
        assert all(torch.equal(a, b) for a, b in zip(*outs))
        assert [(key, m.training) for key, m in theirs.named_modules() if key] == [
            (key, m.training) for key, m in ours.named_modules() if key
        ]
    for levels in outs:
        sum(level.square().mean() for level in levels).backward()
    for (key, p), q in zip(theirs.named_parameters(), ours.parameters()):
        assert p.requires_grad == q.requires_grad, key
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), key
    assert all(torch.equal(a, b) for a, b in zip(theirs.buffers(), ours.buffers()))


HOOKS = [
    ('ResNet', 'ce1', 'register_full_backward_hook'),
    ('ResNet', 'layer1.0', 'register_full_backward_hook'),
    ('ResNet', 'layer1.0.ce', 'register_forward_hook'),
    ('ResNet', 'layer2.0.norm2', 'register_forward_hook'),
    ('ResNet', 'layer2.0.norm2', 'register_full_backward_pre_hook'),
    ('ResNet', 'layer1.0.norm2', 'register_module_forward_hook'),  # of every module, as torch's FLOP counter has
    ('MobileNetV2', 'layer3.1.linear_conv', 'register_forward_hook'),
]


@pytest.mark.parametrize('name, path, register', HOOKS)
def test_a_hook_is_called_and_changes_nothing(name, path, register):
    """CE takes norm, shortcut and ReLU into itself, but not those that have a hook."""
    small = dict(depth=18, base_channels=16) if name == 'ResNet' else dict(widen_factor=0.5)
    plain = randomize(MODELS.build(dict(type=f'CE{name}', norm_eval=True, ce_eval=False, **small))).double().train()
    hooked = copy.deepcopy(plain)
    module = hooked.get_submodule(path)
    seen = []
    owner = every_module if 'module' in register else module
    handle = getattr(owner, register)(lambda called, *_: seen.append(called))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    try:
        outs = hooked(x)
        sum(out.square().mean() for out in outs).backward()
    finally:
        handle.remove()
    expected = plain(x)
    sum(out.square().mean() for out in expected).backward()
    assert module in seen
    for a, b in zip(outs, expected):
        assert_agree(a, b, 1e-9)
    for (key, a), b in zip(hooked.named_parameters(), plain.parameters()):
        assert_agree(a.grad, b.grad, 1e-8, key)
