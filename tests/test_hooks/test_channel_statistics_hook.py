"""The channel statistics hook in a real Runner: what it logs, and that the training stays the same."""

from __future__ import annotations

import json

import pytest
import torch
from mmdet.models import ResNet
from mmengine.config import Config
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner

from mmdet_ce import CEResNet, ChannelStatisticsHook
from mmdet_ce.channel_analysis import analyze_channels

IMAGE = torch.arange(3 * 32 * 32.0).view(3, 32, 32).sin()


class Detector(BaseModel):
    def __init__(self, kind=CEResNet, **kwargs):
        super().__init__(data_preprocessor=dict(type='mmdet.DetDataPreprocessor', mean=[1.0] * 3, std=[2.0] * 3))
        self.backbone = kind(depth=18, base_channels=16, frozen_stages=-1, **{'norm_eval': False, **kwargs})

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=sum(out.square().mean() for out in self.backbone(inputs)))


def train(work_dir, model, hooks=()):
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        cfg=Config(),
        train_dataloader=dict(
            dataset=[dict(inputs=IMAGE)] * 8, batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False)
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
    return {record.pop('step'): record for record in records if 'inhibited/bn1' in record}


def test_logs_what_the_analysis_measures(tmp_path):
    hook = dict(type='ChannelStatisticsHook', interval=2, threshold=0.5)
    runner = train(tmp_path, Detector(ce_cfg=dict(num_channels=16, identity_start=True)), [hook])
    records = logged(tmp_path)
    assert list(records) == [2, 4], 'as mmengine counts'
    expected = {}
    for name, layer in analyze_channels(runner.model.backbone, [((IMAGE - 1) / 2)[None]]).items():
        row = layer.measures(0.5)
        expected[f'inhibited/{name}'] = row['inhibited']
        if layer.ce:
            expected[f'lambda/{name}'] = row['lambda']
            expected[f'alpha/{name}'] = row['alpha']
            expected[f'decorrelation/{name}'] = row['off_diagonal_after'] / row['off_diagonal_before']
    assert records[4] == pytest.approx(expected)
    assert len([key for key in expected if key.startswith('alpha/')]) == 7
    assert sum(value for key, value in expected.items() if key.startswith('inhibited/')) > 0


@pytest.mark.parametrize('arguments', [{}, dict(norm_eval=True), dict(with_cp=True)], ids=str)
def test_training_is_the_same_to_the_bit(tmp_path, arguments):
    states = []
    for name, hooks in (('with', [dict(type='ChannelStatisticsHook', interval=1)]), ('without', [])):
        torch.manual_seed(0)
        states.append(train(tmp_path / name, Detector(**arguments), hooks).model.state_dict())
    assert list(logged(tmp_path / 'with')) == [1, 2, 3, 4] and not logged(tmp_path / 'without')
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_plain_network_under_a_wrapper(tmp_path):
    runner = train(tmp_path, Detector(ResNet))
    store = (tmp_path / 'store').as_uri()
    torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    try:
        runner.model = MMDistributedDataParallel(runner.model, device_ids=None)
        ChannelStatisticsHook(interval=1).after_train_iter(runner, 0, dict(inputs=[IMAGE]))
    finally:
        torch.distributed.destroy_process_group()
    (record,) = logged(tmp_path).values()
    assert all(key.startswith('inhibited/') for key in record)
