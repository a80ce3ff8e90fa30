"""The load summary, and the refusal of files of which nearly nothing matches."""

from __future__ import annotations

import logging

import pytest
import torch
from mmdet.models import ResNet
from mmdet.registry import MODELS
from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint

from mmdet_ce import CEResNet
from mmdet_ce.converters import BLOCK_NAMES
from mmdet_ce.loading import CheckpointMismatchError, summarize_load

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
    assert 'CE is loaded in part' in summarize_load(CEResNet(depth=18, **TINY, **IDENTITY), backbone.state_dict())


@pytest.mark.parametrize('depth, other', [(18, 34), (34, 18), (50, 101), (101, 152), (152, 101), (50, 18)])
def test_wrong_depth(depth, other):
    with pytest.raises(CheckpointMismatchError, match=f'CEResNet-{depth}.*Expected weights of the same architecture'):
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


def test_a_differing_stem_is_no_mismatch():
    backbone = CEResNet(depth=18, in_channels=4, **TINY)
    assert 'tensors loaded' in summarize_load(backbone, ResNet(depth=18, **TINY).state_dict())


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
