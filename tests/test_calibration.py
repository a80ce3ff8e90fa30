"""Calibration: the exact mean over batches, whatever their order, and nothing else changed."""

from __future__ import annotations

import copy
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmdet.models import FPN, ResNet
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MMLogger
from tool_runs import DEMO
from utils import assert_agree, randomize

from mmdet_ce import CEResNet, ChannelEquilibrium
from mmdet_ce.calibration import calibrate

SOFT_TEACHER = 'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'


def make(**kwargs):
    return randomize(CEResNet(depth=18, base_channels=16, **kwargs)).double()


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 48, 48, generator=generator, dtype=torch.float64) for _ in range(count)]


def statistics(backbone):
    return {key: t for key, t in backbone.state_dict().items() if 'running_' in key}


@pytest.mark.parametrize('with_bn', [False, True])
def test_mean_over_batches(with_bn):
    """Of one layer's values by hand: each batch alone gives its own statistics, the result is their mean."""
    backbone, batches = make(norm_eval=True, frozen_stages=1), images(3)
    alone = []
    for batch in batches:
        one = copy.deepcopy(backbone)
        calibrate(one, [batch], 1, with_bn)
        alone.append(statistics(one))
    assert calibrate(backbone, batches, 10, with_bn) == 3
    for key, value in statistics(backbone).items():
        assert_agree(value, sum(s[key] for s in alone) / 3, 1e-12, key)


@pytest.mark.parametrize('with_bn', [False, True])
def test_changes_nothing_else(with_bn):
    backbone = make().train()
    before, modes = copy.deepcopy(backbone), [m.training for m in backbone.modules()]
    calibrate(backbone, images(2), 2, with_bn)
    for (name, a), b in zip(backbone.state_dict().items(), before.state_dict().values()):
        bn = 'running_mean' in name or 'running_var' in name
        is_ce = any(name.startswith(f'{layer}.') for layer, _ in backbone.named_ce())
        if 'running_' in name and (is_ce or (bn and with_bn)):
            assert not torch.equal(a, b), name
        else:
            assert torch.equal(a, b), name
    assert [m.training for m in backbone.modules()] == modes
    assert all(ce.momentum == 0.1 for _, ce in backbone.named_ce())


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_repairs_broken_statistics(value):
    backbone, batches = make(), images(2)
    expected = copy.deepcopy(backbone)
    calibrate(expected, batches, 2, with_bn=True)
    for tensor in statistics(backbone).values():
        tensor.fill_(value)
    calibrate(backbone, batches, 2, with_bn=True)
    for key, tensor in statistics(backbone).items():
        assert torch.equal(tensor, statistics(expected)[key]), key


def test_calibrates_a_plain_network():
    plain, batches = randomize(ResNet(depth=18, base_channels=16)).double(), images(2)
    calibrate(plain, batches, 2, with_bn=True)
    assert_agree(plain.bn1.running_mean, plain.conv1(torch.cat(batches)).mean((0, 2, 3)), 1e-12)


def test_nothing_to_calibrate():
    with pytest.raises(ValueError, match='ResNet has no layer to calibrate'):
        calibrate(ResNet(depth=18), images(1), 1)
    with pytest.raises(ValueError, match='no batch to calibrate with'):
        calibrate(make(), [], 1)


def _one_bad_batch(rank, store):
    torch.distributed.init_process_group('gloo', init_method=store, rank=rank, world_size=2)
    backbone, batches = make(), images(3, seed=rank)
    before = copy.deepcopy(statistics(backbone))
    if rank == 1:
        batches[0][0, 0, 0, 0] = float('inf')
    with pytest.raises(ValueError, match='the statistics of ce1 are not finite'):
        calibrate(backbone, batches, 3)
    assert all(torch.equal(value, before[key]) for key, value in statistics(backbone).items())
    calibrate(backbone, images(1, seed=rank), 1)
    expected = make()
    torch.distributed.destroy_process_group()
    calibrate(expected, [*images(1, seed=0), *images(1, seed=1)], 2)
    for key, value in statistics(expected).items():
        assert_agree(statistics(backbone)[key], value, 1e-12, key)


@pytest.mark.slow
def test_processes_refuse_a_batch_together_and_are_averaged(tmp_path):
    """One of two processes has a batch that is not finite; none waits for the other."""
    torch.multiprocessing.spawn(_one_bad_batch, ((tmp_path / 'store').as_uri(),), nprocs=2)


def semi_supervised():
    """Return mmdet's semi-supervised detector over a shipped one, and a batch of its training."""
    cfg = Config.fromfile(Path(mmdet.__file__).parent / '.mim/configs/soft_teacher' / SOFT_TEACHER).model
    detector = Config.fromfile(DEMO.with_name('retinanet_r18-ce_fpn_8e_bccd.py')).model
    detector.backbone.init_cfg = None
    cfg.type = 'SemiBaseDetector'
    cfg.detector = detector
    batch = dict(inputs={}, data_samples={})
    for branch in ('sup', 'unsup_teacher', 'unsup_student'):
        part = demo_mm_inputs(1, [[3, 64, 96]], num_classes=2)
        part['data_samples'][0].set_metainfo(dict(homography_matrix=np.eye(3, dtype=np.float32)))
        for key, of_branch in batch.items():
            of_branch[branch] = part[key]
    return MODELS.build(cfg), batch


def test_the_student_of_a_semi_supervised_training(caplog):
    """Its teacher runs in evaluation only; one line names what is left out."""
    model, batch = semi_supervised()
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    assert calibrate(model, [batch], 1) == 1
    logger.removeHandler(caplog.handler)
    assert not any(ce.lacks_statistics for _, ce in model.student.backbone.named_ce())
    assert all(ce.lacks_statistics for _, ce in model.teacher.backbone.named_ce())
    (message,) = (r.message for r in caplog.records if 'keep their statistics' in r.message)
    assert message.startswith('7 layers keep') and 'teacher.backbone.ce1' in message and 'skip_buffer=False' in message


@MODELS.register_module()
class NeckWithCE(FPN):
    """A neck that ends with CE."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.ce = ChannelEquilibrium(self.out_channels)

    def forward(self, inputs):
        return tuple(self.ce(out) for out in super().forward(inputs))


def test_ce_in_the_neck_of_a_detector():
    cfg = Config.fromfile(DEMO).model
    cfg.backbone.init_cfg = None
    cfg.neck.type = 'NeckWithCE'
    model = MODELS.build(cfg)
    calibrate(model, [demo_mm_inputs(1, [[3, 64, 96]], num_classes=2, with_mask=True)], 1)
    assert not model.neck.ce.lacks_statistics
    assert not any(ce.lacks_statistics for _, ce in model.backbone.named_ce())


def test_evaluation_agrees_with_training_after_calibration():
    """To rounding on the batch calibrated on; over several batches within 0.2 % of the outputs' energy."""
    backbone, batches = make(norm_eval=True, ce_eval=False, frozen_stages=-1), images(6)

    def drift(batch):
        trained, evaluated = copy.deepcopy(backbone).train()(batch), backbone.eval()(batch)
        return max(((a - b).square().sum() / a.square().sum()).item() for a, b in zip(trained, evaluated))

    assert drift(batches[0]) > 0.1
    calibrate(backbone, batches[:1], 1)
    assert drift(batches[0]) < 1e-20
    calibrate(backbone, batches, 6)
    assert max(map(drift, batches)) < 2e-3
