"""The recipe of docs/deploy.md runs as it is written, and compares."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.utils import digit_version
from utils import randomize

CONFIG = ROOT / 'configs' / 'ce' / 'retinanet_r18-ce-identity_fpn_1x_coco.py'
ONE_STAGE = dict(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,), base_channels=16)


@pytest.mark.slow
@pytest.mark.skipif(digit_version(torch.__version__) < digit_version('2.6'), reason='the recipe needs torch 2.6')
@pytest.mark.parametrize(('name', 'channels'), [('CEResNet', 4), ('CEResNetV1d', 1)])
def test_the_recipe_of_the_page(name, channels, tmp_path, monkeypatch):
    """With a detector for images of other channels than three."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.update(type=name, in_channels=channels, init_cfg=None, **ONE_STAGE)
    cfg.model.neck.update(in_channels=[16], start_level=0)
    model = MODELS.build(cfg.model)
    randomize(model.backbone)
    monkeypatch.chdir(tmp_path)
    cfg.dump('CONFIG.py')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=['a']))), 'CHECKPOINT.pth')
    recipe = re.search(r'```python\n(.*?)```', (ROOT / 'docs' / 'deploy.md').read_text(), re.S)[1]
    names = {}
    exec(recipe, names)
    assert names['channels'] == channels and 0 < names['error'] < 1e-4
