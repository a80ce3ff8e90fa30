"""Same seed, same losses."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ROOT
from make_shapes_dataset import make_dataset
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

pytestmark = pytest.mark.slow

ITERATIONS = 20


class Losses(Hook):
    """Collect every loss of a training."""

    def before_run(self, runner):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({key: float(value) for key, value in outputs.items()})


@pytest.fixture(scope='module')
def cfg(tmp_path_factory):
    """The demo's config, on 10 small images."""
    data = tmp_path_factory.mktemp('data') / 'shapes'
    make_dataset(data, train=10, val=1, size=64)
    cfg = Config.fromfile(ROOT / 'configs' / 'demo' / 'mask-rcnn_r18-ce_fpn_8e_shapes.py')
    cfg.train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.data_root = str(data)
    cfg.model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    cfg.model.train_cfg.rcnn.sampler.num = 16
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    for key in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{key}_{part}'] = None
    return cfg


def train(cfg, work_dir, seed, iterations=ITERATIONS):
    cfg = copy.deepcopy(cfg)
    cfg.train_cfg.max_epochs = iterations // 10
    cfg.work_dir, cfg.randomness, cfg.experiment_name = str(work_dir), dict(seed=seed), work_dir.name
    runner = Runner.from_cfg(cfg)
    losses = Losses()
    runner.register_hook(losses)
    runner.train()
    return losses.losses, runner.model.backbone.state_dict()


def test_same_seed_same_losses(cfg, tmp_path):
    """All losses of 20 iterations, CE's running statistics and all weights, to the bit."""
    (losses, state), (again, state_again) = (train(cfg, tmp_path / name, seed=0) for name in ('first', 'second'))
    other, _ = train(cfg, tmp_path / 'other', seed=1, iterations=10)
    assert len(losses) == ITERATIONS and losses == again
    assert losses[0] != other[0] and losses[9] != other[9], 'the seed has something to say'
    assert any('running_whitening' in key for key in state)
    assert all(torch.equal(value, state_again[key]) for key, value in state.items())
