"""The load summary, and the refusal of files whose tensors nearly all do not match."""

from __future__ import annotations

import logging

import pytest
import torch
from mmdet.models import ResNet
from mmdet.registry import MODELS
from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint, load_state_dict

from mmdet_ce import CEResNet
from mmdet_ce.backbones.loading_report import CheckpointMismatchError, summarize_load
from mmdet_ce.checkpoints.official import BLOCK_NAMES

TINY = dict(base_channels=16)
IDENTITY = dict(ce_cfg=dict(num_channels=16, identity_start=True))


def tensors(backbone):
    return [key for key in backbone.state_dict() if not key.endswith('num_batches_tracked')]


@pytest.mark.parametrize('kwargs, meaning', [({}, 'plain weights under an untrained CE'), (IDENTITY, 'grows in')])
def test_plain_weights(kwargs, meaning):
    plain, backbone = ResNet(depth=18, **TINY), CEResNet(depth=18, **TINY, **kwargs)
    state = {**plain.state_dict(), 'fc.weight': torch.zeros(10, 128), 'fc.bias': torch.zeros(10)}
    summary = summarize_load(backbone, state)
    num_plain, num_all = len(tensors(plain)), len(tensors(backbone))
    num_ce = num_all - num_plain
    assert summary.startswith(
        f'CEResNet-18: {num_plain} of {num_all} tensors loaded, {num_ce} of {num_ce} CE tensors missing, '
        '2 unexpected (the classifier): plain weights'
    )
    assert meaning in summary and '\n' not in summary


def test_weights_with_ce():
    backbone = CEResNet(depth=18, **TINY)
    num_ce = len(tensors(backbone)) - len(tensors(ResNet(depth=18, **TINY)))
    summary = summarize_load(backbone, CEResNet(depth=18, **TINY).state_dict())
    assert f'0 of {num_ce} CE tensors missing, 0 unexpected: CE is loaded with its statistics' in summary
    partly = CEResNet(depth=18, stem_with_ce=False, **TINY).state_dict()
    assert 'CE is loaded in part' in summarize_load(backbone, partly)
    identity = CEResNet(depth=18, **TINY, **IDENTITY)
    assert 'CE is loaded in part' in summarize_load(identity, backbone.state_dict())
    assert 'CE is loaded in part' in summarize_load(backbone, identity.state_dict()), 'its alphas would be lost'
    fewer = CEResNet(depth=18, stage_with_ce=(True, False, False, False), **TINY)
    assert 'CE is loaded in part' in summarize_load(fewer, backbone.state_dict())


WRONG = [(18, 34), (34, 18), (50, 101), (101, 152), (152, 101), (50, 18), (50, 34), (34, 50)]


@pytest.mark.parametrize('depth, other', WRONG)
def test_wrong_depth(depth, other):
    with pytest.raises(CheckpointMismatchError, match=f'CEResNet-{depth}.*Expected weights of the same arch'):
        summarize_load(CEResNet(depth=depth, base_channels=4), ResNet(depth=other, base_channels=4).state_dict())


def test_prefix_is_named():
    state = {f'backbone.{key}': t for key, t in ResNet(depth=18, **TINY).state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match="only 0 of .* begin with 'backbone.': add prefix='backbone.'"):
        CEResNet(depth=18, **TINY).load_state_dict(state, strict=False)


def test_unconverted_official_file_is_named():
    state = {f'module.layer1.0.ce.{name}': torch.zeros(1) for name in BLOCK_NAMES}
    with pytest.raises(CheckpointMismatchError, match='convert it with tools/model_converters/official_to_mmdet_ce.py'):
        summarize_load(CEResNet(depth=18, **TINY), state)


def test_another_architecture():
    with pytest.raises(CheckpointMismatchError, match='only 0 of'):
        summarize_load(CEResNet(depth=18, **TINY), {'patch_embed.weight': torch.zeros(3)})


CONTEXT_BLOCK = dict(cfg=dict(type='ContextBlock', ratio=1 / 4), position='after_conv3')


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(depth=18, in_channels=4),
        dict(depth=50, deep_stem=True, avg_down=True),
        dict(depth=18, deep_stem=True, avg_down=True),
        dict(depth=50, plugins=[CONTEXT_BLOCK]),
        dict(depth=18, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,)),
        dict(depth=50, dcn=dict(type='DCN', deform_groups=1), stage_with_dcn=(False, True, True, True)),
    ],
    ids=lambda kwargs: '-'.join(map(str, kwargs)),
)
def test_what_differs_with_reason_is_no_mismatch(kwargs):
    plain = ResNet(depth=kwargs['depth'], **TINY)
    assert 'plain weights under' in summarize_load(CEResNet(**kwargs, **TINY), plain.state_dict())


def test_anything_loads_where_ce_is_off():
    backbone = CEResNet(depth=18, ce_cfg=None, **TINY)
    backbone.load_state_dict({}, strict=False)
    backbone.load_state_dict(CEResNet(depth=18, **TINY).state_dict(), strict=False)


def test_entries_that_are_no_tensors_are_passed_over():
    backbone = CEResNet(depth=18, **TINY)
    state = {**backbone.state_dict(), 'extra_state': {}, 3: [1]}
    assert 'CE is loaded with its statistics' in summarize_load(backbone, state)


def test_a_backbone_alone_is_no_detector():
    model = torch.nn.ModuleDict(dict(backbone=CEResNet(depth=18, **TINY)))
    with pytest.raises(CheckpointMismatchError, match='Expected a checkpoint of the whole detector; one of a backbone'):
        load_state_dict(model, ResNet(depth=18, **TINY).state_dict())


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_logged_whatever_loads(prefix, tmp_path, caplog):
    """mmengine loads a backbone (init_cfg) or a detector (load_from, resume, test) without load_state_dict."""
    backbone = CEResNet(depth=18, **TINY)
    model = torch.nn.ModuleDict(dict(backbone=backbone)) if prefix else backbone
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        load_checkpoint(model, str(tmp_path / 'a.pth'))
    logger.removeHandler(caplog.handler)
    assert [m for m in caplog.messages if m.startswith('CEResNet-18:') and 'CE is loaded with its statistics' in m]


def test_missing_weights_tell_how_to_get_them():
    cfg = dict(type='Pretrained', checkpoint='checkpoints/ce-resnet50_imagenet.pth')
    backbone = MODELS.build(dict(type='CEResNet', depth=18, init_cfg=cfg, **TINY))
    with pytest.raises(FileNotFoundError, match=r'official_to_mmdet_ce.py THEIR_FILE .*r50-ce-identity'):
        backbone.init_weights()
