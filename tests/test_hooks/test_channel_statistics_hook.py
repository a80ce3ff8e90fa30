"""The channel statistics hook in a real Runner: what it logs, and that the training stays the same."""

from __future__ import annotations

import json

import pytest
import torch
from mmdet.models import ResNet
from mmdet.registry import DATASETS, HOOKS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmdet_ce import CEResNet, ChannelStatisticsHook
from mmdet_ce.channel_analysis import analyze_channels

HOOK = dict(type='ChannelStatisticsHook', interval=2)


class Detector(BaseModel):
    """The least that a Runner trains: a backbone and a loss."""

    def __init__(self, kind=CEResNet, **kwargs):
        super().__init__(data_preprocessor=dict(type='mmdet.DetDataPreprocessor', mean=[1.0] * 3, std=[2.0] * 3))
        self.backbone = kind(depth=18, base_channels=16, frozen_stages=-1, **{'norm_eval': False, **kwargs})

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=sum(out.square().mean() for out in self.backbone(inputs)))


@DATASETS.register_module()
class SameImages(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(
            inputs=torch.arange(3 * 32 * 32.0).view(3, 32, 32).sin(),
            data_samples=DetDataSample(metainfo=dict(img_shape=(32, 32))),
        )


def train(work_dir, model, hooks=(), backends=('LocalVisBackend',), max_iters=4, optim_wrapper=None, resume=False):
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        cfg=Config(),
        train_dataloader=dict(
            dataset=dict(type='SameImages'), batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-2), **(optim_wrapper or {})),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False)),
        custom_hooks=list(hooks),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type=backend) for backend in backends]),
        randomness=dict(seed=0),
        default_scope='mmdet',
        resume=resume,
        experiment_name=f'{"-".join(work_dir.parts[-2:])}-{max_iters}',
    )
    runner.train()
    return runner


def logged(work_dir):
    """The hook's records, by step."""
    records = {}
    for path in work_dir.glob('*/vis_data/scalars.json'):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if 'inhibited/bn1' in record:
                records[record.pop('step')] = record
    return records


@pytest.mark.parametrize('identity_start', [False, True])
def test_logs_what_the_analysis_measures(identity_start, tmp_path):
    """Every backend gets them; steps are counted as mmengine's own logger counts them."""
    hook = {**HOOK, 'relative_threshold': 0.5}
    model = Detector(ce_cfg=dict(num_channels=16, identity_start=identity_start))
    runner = train(tmp_path, model, [hook], ['LocalVisBackend', 'TensorboardVisBackend'])
    records = logged(tmp_path)
    assert list(records) == [2, 4]
    item = SameImages()[0]['inputs']
    expected = {}
    for name, layer in analyze_channels(runner.model.backbone, [((item - 1) / 2)[None].repeat(2, 1, 1, 1)]).items():
        row = layer.measures(0.5)
        expected[f'inhibited/{name}'] = row['inhibited_relative']
        if layer.ce is not None:
            expected[f'lambda/{name}'] = row['lambda']
            expected[f'decorrelation/{name}'] = row['off_diagonal_after'] / row['off_diagonal_before']
            if identity_start:
                expected[f'alpha/{name}'] = row['alpha']
                assert row['alpha'] != 0
    assert records[4] == pytest.approx(expected)
    assert len([key for key in expected if key.startswith('lambda/')]) == 7
    assert 0 < sum(value for key, value in expected.items() if key.startswith('inhibited/'))

    (events,) = tmp_path.glob('*/vis_data/events*')
    accumulator = EventAccumulator(str(events)).Reload()
    (first, last) = accumulator.Scalars('decorrelation/layer1.0.bn2')
    assert (first.step, last.step) == (2, 4)
    assert last.value == pytest.approx(expected['decorrelation/layer1.0.bn2'])


@pytest.mark.parametrize(
    'arguments, optim_wrapper',
    [
        ({}, {}),
        (dict(norm_eval=True), {}),  # the norm is folded into CE
        (dict(with_cp=True), dict(accumulative_counts=2)),
    ],
    ids=['', 'norm_eval', 'with_cp, accumulated'],
)
def test_training_is_the_same_to_the_bit(tmp_path, arguments, optim_wrapper):
    states = []
    for name, hooks in (('with', [{**HOOK, 'interval': 1}]), ('without', [])):
        torch.manual_seed(0)
        runner = train(tmp_path / name, Detector(**arguments), hooks, optim_wrapper=optim_wrapper)
        states.append(runner.model.state_dict())
        assert not any(m._forward_hooks for m in runner.model.modules())
    assert logged(tmp_path / 'with').keys() == {1, 2, 3, 4} and not logged(tmp_path / 'without')
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_continues_after_resume(tmp_path):
    train(tmp_path, Detector(), [HOOK], max_iters=2)
    train(tmp_path, Detector(), [HOOK], max_iters=4, resume=True)
    assert sorted(logged(tmp_path)) == [2, 4]


def test_plain_network(tmp_path):
    train(tmp_path, Detector(ResNet), [HOOK])
    assert all(key.startswith('inhibited/') for key in logged(tmp_path)[4])


def test_under_a_wrapper(tmp_path):
    runner = train(tmp_path, Detector())
    store = (tmp_path / 'store').as_uri()
    torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    try:
        runner.model = MMDistributedDataParallel(runner.model, device_ids=None)
        hook = ChannelStatisticsHook(interval=1)
        hook.before_train(runner)
        hook.after_train_iter(runner, 0, dict(inputs=[SameImages()[0]['inputs']]))
    finally:
        torch.distributed.destroy_process_group()
    assert list(logged(tmp_path)) == [runner.iter + 1]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match='interval must be at least 1, got 0'):
        HOOKS.build(dict(type='ChannelStatisticsHook', interval=0))
    model = Detector()
    model.body = model.backbone
    del model.backbone
    with pytest.raises(ValueError, match='ChannelStatisticsHook needs a model with a backbone; Detector has none'):
        train(tmp_path, model, [HOOK])
