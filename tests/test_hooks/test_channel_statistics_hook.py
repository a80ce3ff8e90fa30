"""The channel statistics hook in a real Runner: what it logs, and that the training stays the same."""

from __future__ import annotations

import json

import pytest
import torch
from mmdet.models import ResNet
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmdet_ce import CEResNet

IMAGES = torch.arange(8 * 3 * 64 * 64.0).view(8, 3, 64, 64).sin()


class Detector(BaseModel):
    """Two backbones, of which none has the usual name."""

    def __init__(self, kind=CEResNet, **kwargs):
        super().__init__(data_preprocessor=dict(type='mmdet.DetDataPreprocessor', mean=[1.0] * 3, std=[2.0] * 3))
        arguments = dict(depth=18, base_channels=16, frozen_stages=-1, norm_eval=False)
        self.first = kind(**{**arguments, **kwargs})
        self.second = ResNet(**arguments)
        self.double()  # a training in float32 makes much of rounding

    def forward(self, inputs, data_samples=None, mode='tensor'):
        inputs = inputs.double()
        return dict(loss=sum(out.square().mean() for out in (*self.first(inputs), *self.second(inputs))))


def train(work_dir, model, hooks=()):
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        cfg=Config(),
        train_dataloader=dict(
            dataset=[dict(inputs=image) for image in IMAGES],
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-2)),
        custom_hooks=list(hooks),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        randomness=dict(seed=0),
        default_scope='mmdet',
        experiment_name='-'.join(work_dir.parts[-2:]),
    )
    runner.train()
    return runner


def logged(work_dir):
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record.pop('step'): record for record in records if 'inhibited/first.bn1' in record}


def test_logs_every_network(tmp_path):
    model = Detector(ce_cfg=dict(num_channels=16, identity_start=True))
    train(tmp_path, model, [dict(type='ChannelStatisticsHook', interval=2, threshold=0.5)])
    records = logged(tmp_path)
    assert list(records) == [2, 4], 'as mmengine counts'
    slots = ['bn1', *(f'layer{stage}.{block}.bn2' for stage in (1, 2, 3) for block in (0, 1))]
    for kind in ('lambda', 'alpha', 'decorrelation'):
        assert [key for key in records[4] if key.startswith(kind)] == [f'{kind}/first.{slot}' for slot in slots]
    inhibited = [key for key in records[4] if key.startswith('inhibited/')]
    assert len(inhibited) == 2 * 17 and sum(records[4][key] for key in inhibited) > 0
    assert 0 < records[2]['lambda/first.bn1'] < 1 and records[2]['alpha/first.bn1'] != 0


@pytest.mark.parametrize('arguments', [dict(kind=ResNet), dict(with_cp=True), dict(norm_eval=True)], ids=str)
def test_training_stays_the_same(tmp_path, arguments):
    """To the bit in a plain network; up to rounding with CE, which takes its neighbours apart to be watched."""
    states = []
    for name, hooks in (('with', [dict(type='ChannelStatisticsHook', interval=1)]), ('without', [])):
        torch.manual_seed(0)
        states.append(train(tmp_path / name, Detector(**arguments), hooks).model.state_dict())
    assert list(logged(tmp_path / 'with')) == [1, 2, 3, 4] and not logged(tmp_path / 'without')
    tolerance = 0 if 'kind' in arguments else 1e-9
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=tolerance, atol=tolerance)
