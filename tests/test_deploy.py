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
def test_the_recipe_of_the_page(tmp_path, monkeypatch):
    """With a detector for images of four channels."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.update(in_channels=4, init_cfg=None, **ONE_STAGE)
    cfg.model.neck.update(in_channels=[16], start_level=0)
    model = MODELS.build(cfg.model)
    randomize(model.backbone)
    monkeypatch.chdir(tmp_path)
    cfg.dump('CONFIG.py')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=['a']))), 'CHECKPOINT.pth')
    recipe = re.search(r'```python\n(.*?)```', (ROOT / 'docs' / 'deploy.md').read_text(), re.S)[1]
    names = {}
    exec(recipe, names)
    assert names['channels'] == 4 and 0 < names['error'] < 1e-4
