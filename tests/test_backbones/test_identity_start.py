"""``identity_start``: with the weights of a plain network, a detector with CE computes what the plain one does."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config
from utils import assert_agree, randomize, unset_statistics

from mmdet_ce import CEResNet


@pytest.mark.parametrize('name', ['mask-rcnn_r50-ce-identity_fpn_1x_coco', 'retinanet_r50-ce-identity_fpn_1x_coco'])
def test_identity_start_equals_the_plain_detector(name):
    """The shipped configs, with the weights of mmdet's own detector: the same features and raw predictions."""
    cfg = Config.fromfile(ROOT / 'configs' / 'ce' / f'{name}.py').model
    plain_cfg = copy.deepcopy(cfg)
    plain_cfg.backbone = dict(type='ResNet', depth=50, norm_cfg=dict(type='BN'), style='pytorch')
    plain, model = randomize(MODELS.build(plain_cfg)).eval(), MODELS.build(cfg).eval()
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys and all('.ce' in key for key in result.missing_keys)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(model.backbone(x), plain.backbone(x)):
            assert_agree(a, b, 1e-5)
        head = 'rpn_head' if name.startswith('mask') else 'bbox_head'
        for a, b in zip(getattr(model, head)(model.extract_feat(x)), getattr(plain, head)(plain.extract_feat(x))):
            for p, q in zip(a, b):
                assert_agree(p, q, 1e-5)


def test_identity_configs_freeze_no_untouched_ce():
    for path in (ROOT / 'configs' / 'ce').glob('*ce-identity*.py'):
        backbone = MODELS.build(Config.fromfile(path).model.backbone).train()
        assert all(ce.training and all(p.requires_grad for p in ce.parameters()) for _, ce in backbone.named_ce())


def test_an_identity_needs_no_statistics():
    backbone = CEResNet(depth=18, ce_cfg=dict(num_channels=16, identity_start=True), base_channels=16).eval()
    assert not unset_statistics(lambda: backbone(torch.rand(1, 3, 32, 32)))
    next(ce for _, ce in backbone.named_ce()).alpha.data.fill_(0.1)
    assert len(unset_statistics(lambda: backbone.eval()(torch.rand(1, 3, 32, 32)))) == 1
