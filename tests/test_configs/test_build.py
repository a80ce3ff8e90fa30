"""Every shipped config parses and builds from any working directory, and MMDetection's own rules hold for it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmdet.models import ResNet
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper

from mmdet_ce.backbones.ce_backbone import CEBackbone

CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != 'imagenet')
SCHEDULE = re.compile(r'([12])x_coco$')
NUM_LAYERS = {18: 7, 50: 14, 101: 31, None: 17}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_builds_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(path)
    assert cfg.custom_imports == dict(imports=['mmdet_ce'], allow_failed_imports=False)
    checkpoint = cfg.default_hooks.checkpoint
    assert checkpoint.backend_args == dict(backend='atomic')
    assert checkpoint.get('max_keep_ckpts', -1) != 1, 'mmengine deletes the old one before it writes the new one'
    assert 'torchvision://' not in cfg.pretty_text
    schedule = SCHEDULE.search(path.stem)
    assert not schedule or cfg.train_cfg.max_epochs == 12 * int(schedule[1])
    model = MODELS.build(cfg.model).train()
    if '-ce' not in path.stem:  # the baseline
        assert type(model.backbone) is ResNet
        return
    assert isinstance(model.backbone, CEBackbone)
    layers = dict(model.backbone.named_ce())
    assert len(layers) == NUM_LAYERS[getattr(model.backbone, 'depth', None)]
    hooks = [hook['type'] for hook in cfg.custom_hooks]
    assert 'SyncBuffersHook' in hooks, 'else each process validates with statistics of its own'
    is_identity = '-identity' in path.stem
    for name, layer in layers.items():
        assert layer.is_identity is is_identity, name
        assert not is_identity or (layer.training and layer.alpha.requires_grad), f'{name} would stay the identity'


@pytest.mark.parametrize('path', [path for path in CONFIGS if 'https:' in path.read_text()], ids=lambda p: p.stem)
def test_plain_weights_need_no_torchvision(path, tmp_path, monkeypatch):
    """A file in torch's cache, with the name that the address ends with, stands for the download."""
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cfg = Config.fromfile(path).model.backbone
    plain = ResNet(cfg.depth)
    cache = tmp_path / 'hub' / 'checkpoints'
    cache.mkdir(parents=True)
    torch.save(plain.state_dict(), cache / Path(cfg.init_cfg.checkpoint).name)
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    assert torch.equal(backbone.conv1.weight, plain.conv1.weight)


@pytest.mark.slow
@pytest.mark.parametrize('path', [path for path in CONFIGS if '_2x_' not in path.stem], ids=lambda p: p.stem)
def test_config_trains_one_iteration(path):
    """Forward, loss, backward and a step of the config's own optimizer wrapper, on one small image."""
    cfg = Config.fromfile(path)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()  # as mmengine does outside distributed training
    model.init_cfg = model.backbone.init_cfg = None
    amp = cfg.optim_wrapper.type == 'AmpOptimWrapper'
    if amp:  # mmengine refuses it on a CPU; the same autocast without its wrapper
        cfg.optim_wrapper.type = 'OptimWrapper'
        if getattr(model, 'with_roi_head', False) and not torch.cuda.is_available():
            pytest.skip("mmcv's RoIAlign has no bfloat16 on a CPU")
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = demo_mm_inputs(1, [[3, 64, 96]], num_classes=2, with_mask=model.with_mask)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=amp):
        losses = model.train_step(batch, wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    backbone = {name for name in changed if name.startswith('backbone.')}
    assert backbone and changed - backbone
    for name, layer in dict(getattr(model.backbone, 'named_ce', dict)()).items():
        growing = f'backbone.{name}.{"alpha" if layer.alpha is not None else "theta"}'
        assert growing in changed or growing not in before, f'{growing} did not move'
