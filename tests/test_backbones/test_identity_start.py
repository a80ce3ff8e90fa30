"""``identity_start``: with the weights of a plain network, a detector with CE computes what the plain one does."""

from __future__ import annotations

import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config
from utils import assert_agree, randomize, unset_statistics

from mmdet_ce import CEResNet


def test_identity_start_equals_the_plain_detector():
    """A shipped config, with the weights of mmdet's own detector: the same raw predictions."""
    plain_cfg = Config.fromfile(ROOT / 'configs' / 'ce' / 'retinanet_r50-ce-identity_fpn_1x_coco.py').model
    model = MODELS.build(plain_cfg).eval()
    plain_cfg.backbone = dict(type='ResNet', depth=50)
    plain = randomize(MODELS.build(plain_cfg)).eval()
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys and all('.ce' in key for key in result.missing_keys)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(model(x), plain(x)):
            for a, b in zip(ours, theirs):
                assert_agree(a, b, 1e-5)


def test_an_identity_needs_no_statistics():
    backbone = CEResNet(depth=18, ce_cfg=dict(num_channels=16, identity_start=True), base_channels=16).eval()
    assert not unset_statistics(lambda: backbone(torch.rand(1, 3, 32, 32)))
    next(ce for _, ce in backbone.named_ce()).alpha.data.fill_(0.1)
    assert len(unset_statistics(lambda: backbone.eval()(torch.rand(1, 3, 32, 32)))) == 1
