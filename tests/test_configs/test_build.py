"""Every shipped config parses and builds from any working directory, and MMDetection's own rules hold for it."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from mmdet.models import ResNet
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_ce import CEResNet

CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != 'imagenet')
NAME = re.compile(r'[a-z0-9-]+_r\d+(-[a-z0-9]+)*_fpn_[a-z0-9-]+_(coco|shapes)')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_builds_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(path)
    assert cfg.custom_imports == dict(imports=['mmdet_ce'], allow_failed_imports=False)
    assert NAME.fullmatch(path.stem)
    model = MODELS.build(cfg.model)
    if '-ce' not in path.stem:  # the baseline
        assert type(model.backbone) is ResNet
        return
    assert type(model.backbone) is CEResNet
    layers = dict(model.backbone.named_ce())
    assert len(layers) == {18: 7, 50: 14, 101: 31}[model.backbone.depth]
    assert all(layer.is_identity == ('-identity' in path.stem) for layer in layers.values())


def test_coco_configs_are_a_few_lines():
    assert CONFIGS
    for path in (ROOT / 'configs' / 'ce').glob('*.py'):
        assert len(path.read_text().splitlines()) <= 11, path


def test_without_custom_imports_the_framework_names_the_backbone():
    """In a fresh process: what a user of MMDetection's own tools sees."""
    import subprocess
    import sys

    code = (
        'from mmdet.utils import register_all_modules; register_all_modules()\n'
        "from mmdet.registry import MODELS; MODELS.build(dict(type='CEResNet', depth=18))"
    )
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert result.returncode and 'CEResNet is not in the mmdet::model registry' in result.stderr
