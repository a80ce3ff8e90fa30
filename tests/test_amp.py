"""Mixed precision in a real training.

mmengine's AmpOptimWrapper refuses a CPU, and so do mmcv's nms and RoIAlign in half precision. What is left runs here:
its backward pass, loss scaling and step, under torch's autocast, in a detector whose training needs neither operator.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics

import pytest
import torch
from conftest import ROOT
from make_shapes_dataset import make_dataset
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from test_determinism import Losses
from utils import needs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('amp')]  # one worker, one training in float32

ITERATIONS = 20


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(AmpOptimWrapper):
    """AmpOptimWrapper without its demand for a GPU."""

    def __init__(self, dtype, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.cast_dtype = getattr(torch, dtype)
        float16 = dtype == 'float16'
        self.loss_scaler = torch.amp.GradScaler('cpu') if float16 else torch.cuda.amp.GradScaler(enabled=False)

    @contextlib.contextmanager
    def optim_context(self, model):
        with OptimWrapper.optim_context(self, model), torch.autocast('cpu', self.cast_dtype):
            yield


@pytest.fixture(scope='module')
def cfg(tmp_path_factory):
    """A small RetinaNet over the demo's CE backbone, on 10 small images."""
    data = tmp_path_factory.mktemp('data') / 'shapes'
    make_dataset(data, train=10, val=1, size=64)
    demo = Config.fromfile(ROOT / 'configs' / 'demo' / 'mask-rcnn_r18-ce_fpn_8e_shapes.py')
    cfg = Config.fromfile(ROOT / 'configs' / 'ce' / 'retinanet_r50-ce_fpn_1x_coco.py')
    cfg.model.backbone, cfg.train_dataloader = demo.model.backbone, demo.train_dataloader
    cfg.optim_wrapper, cfg.param_scheduler = demo.optim_wrapper, demo.param_scheduler
    # no P7: for a stride of 2 on a map of 1x1, torch 2.13 on a CPU returns NaN as bfloat16 gradient, now and then
    cfg.model.neck.update(in_channels=[32, 64, 128, 256], out_channels=32, num_outs=4)
    cfg.model.bbox_head.update(num_classes=4, in_channels=32, feat_channels=32, stacked_convs=1)
    cfg.model.bbox_head.anchor_generator.update(octave_base_scale=2, strides=[8, 16, 32, 64])
    cfg.train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.data_root = str(data)
    cfg.train_cfg.max_epochs = ITERATIONS // 10
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    cfg.randomness = dict(seed=0)
    for key in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{key}_{part}'] = None
    return cfg


def train(cfg, work_dir, **optim_wrapper):
    cfg.optim_wrapper.update(optim_wrapper)
    cfg.work_dir, cfg.experiment_name = str(work_dir), work_dir.name
    runner = Runner.from_cfg(cfg)
    losses = Losses()
    runner.register_hook(losses)
    runner.train()
    return [loss['loss'] for loss in losses.losses], runner.model


@pytest.fixture(scope='module')
def expected(cfg, tmp_path_factory):
    """The losses in float32."""
    return train(copy.deepcopy(cfg), tmp_path_factory.mktemp('float32'))[0]


@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float16', marks=needs('float16 under autocast on a CPU'))])
def test_training_in_half_precision_ends_as_in_full(dtype, cfg, expected, tmp_path):
    """Finite throughout, and as near to float32 as the last iterations are to each other."""
    losses, model = train(copy.deepcopy(cfg), tmp_path / dtype, type='CPUAmpOptimWrapper', dtype=dtype)
    assert len(losses) == ITERATIONS and all(map(math.isfinite, losses))
    assert losses != expected, 'it was half precision'
    state = model.state_dict()
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    assert all(value.dtype == torch.float32 for key, value in state.items() if '.ce' in key)
    difference = abs(statistics.mean(losses[-10:]) - statistics.mean(expected[-10:]))
    assert difference < statistics.stdev(expected[-10:])
