"""What mmengine writes comes back whole through the gate: resumed from, and published."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import publish_model
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.checkpoints import read_checkpoint


class Model(BaseModel):
    """A convolution, BatchNorm and CE."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.ce = torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), ChannelEquilibrium(16)

    def forward(self, x, mode='tensor'):
        return dict(loss=self.ce(self.norm(self.conv(torch.stack(x)))).square().mean())


class Images(torch.utils.data.Dataset):
    METAINFO = dict(classes=('a', 'b'), palette=[(1, 2, 3), (4, 5, 6)])
    metainfo = METAINFO

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return dict(x=torch.full((3, 9, 9), float(index)) + torch.eye(9))


class Start(Hook):
    """Keeps the state that a training starts from."""

    def before_train(self, runner):
        self.step = runner.epoch, runner.iter
        self.model, self.optimizer = copy.deepcopy((runner.model.state_dict(), runner.optim_wrapper.state_dict()))
        self.schedulers = copy.deepcopy([scheduler.state_dict() for scheduler in runner.param_schedulers])


def runner(work_dir, epochs: int, resume: bool = False, **optimizer) -> Runner:
    return Runner(
        model=Model(),
        work_dir=str(work_dir),
        train_dataloader=dict(dataset=Images(), batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False)),
        optim_wrapper=dict(optimizer=optimizer, clip_grad=dict(max_norm=1.0)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=2),
            dict(type='OneCycleLR', eta_max=0.01, total_steps=12, by_epoch=False),
            dict(type='MultiStepLR', milestones=[1], by_epoch=True),
        ],
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        custom_hooks=[dict(type='EMAHook', momentum=0.1)],
        default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1)),
        resume=resume,
        default_scope='mmdet',
        experiment_name=f'{work_dir.name}_{resume}',
    )


def assert_same(first: Any, second: Any, where: str = '') -> None:
    """Assert that two trees of data are equal in types and values."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, HistoryBuffer):
        assert np.array_equal(first.data, second.data), where
    elif isinstance(first, dict):
        assert {*first} == {*second}, where
        for key in first:
            assert_same(first[key], second[key], f'{where}.{key}')
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second)):
            assert_same(one, other, f'{where}.{index}')
    else:
        assert first == second, where


@pytest.mark.parametrize('optimizer', [dict(type='SGD', lr=0.01, momentum=0.9), dict(type='AdamW', lr=0.001)])
def test_training_with_ema_and_one_cycle_resumes(tmp_path, optimizer):
    run = runner(tmp_path, 2, **optimizer)
    run.train()
    saved = read_checkpoint(tmp_path / 'epoch_2.pth')
    assert saved.keys() >= {'meta', 'state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'message_hub'}
    assert_same(saved['optimizer'], run.optim_wrapper.state_dict())
    assert_same(dict(saved['message_hub']['log_scalars']), dict(run.message_hub.log_scalars))

    resumed = runner(tmp_path, 3, resume=True, **optimizer)
    start = Start()
    resumed.register_hook(start, priority='LOWEST')
    resumed.train()
    assert start.step == (2, 6) and resumed.iter == 9
    assert_same(start.optimizer, run.optim_wrapper.state_dict())
    assert_same(start.model, run.model.state_dict())
    for ours, theirs in zip(start.schedulers, run.param_schedulers):
        assert_same(ours, theirs.state_dict())

    named = publish_model.publish(tmp_path / 'epoch_3.pth', tmp_path / 'published.pth')
    assert_same(read_checkpoint(named)['state_dict'], read_checkpoint(tmp_path / 'epoch_3.pth')['state_dict'])
    assert_same(dict(torch.load(named)['state_dict']), read_checkpoint(named)['state_dict'], 'by torch alone')


SCHEDULERS = dict(
    ConstantLR={}, CosineAnnealingLR=dict(T_max=5), ExponentialLR=dict(gamma=0.9), LinearLR={}, PolyLR={},
    MultiStepLR=dict(milestones=[3, 3, 5]), StepLR=dict(step_size=2), OneCycleLR=dict(eta_max=1.0, total_steps=9),
    CosineRestartLR=dict(periods=[3, 4], restart_weights=[1, 0.5], eta_min=0.0),
    ReduceOnPlateauLR=dict(monitor='loss'), QuadraticWarmupLR={},
)  # fmt: skip


def test_every_scheduler_loads_as_it_was_saved(tmp_path):
    known = {name for name in PARAM_SCHEDULERS.module_dict if name.endswith('LR')}
    assert known <= {*SCHEDULERS}, 'mmengine and mmdet have no other'
    for name in known:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        scheduler = PARAM_SCHEDULERS.build(dict(type=name, optimizer=optimizer, **SCHEDULERS[name]))
        optimizer.step()
        scheduler.step(*([dict(loss=1.0)] if name == 'ReduceOnPlateauLR' else []))
        torch.save(dict(param_schedulers=[scheduler.state_dict()]), tmp_path / 'a.pth')
        before = dict(scheduler.__dict__)
        scheduler.load_state_dict(read_checkpoint(tmp_path / 'a.pth')['param_schedulers'][0])
        for key, value in scheduler.__dict__.items():
            assert type(value) is type(before[key]), (name, key)
        scheduler.step(*([dict(loss=1.0)] if name == 'ReduceOnPlateauLR' else []))


OPTIMIZERS = [
    'SGD',
    'Adam',
    'AdamW',
    'Adagrad',
    'Adadelta',
    'Adamax',
    'NAdam',
    'RAdam',
    'RMSprop',
    'Rprop',
    'ASGD',
    'LBFGS',
]


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_loads_as_it_was_saved(name, tmp_path):
    weight = torch.randn(3, requires_grad=True)
    optimizer = getattr(torch.optim, name)([weight], lr=0.1)

    def loss():
        weight.grad = torch.ones(3)
        return weight.sum()

    optimizer.step(loss)
    torch.save(dict(optimizer=optimizer.state_dict()), tmp_path / 'a.pth')
    loaded = read_checkpoint(tmp_path / 'a.pth')['optimizer']
    assert_same(loaded, optimizer.state_dict())
    optimizer.load_state_dict(loaded)
    optimizer.step(loss)


def test_other_states_of_a_training_load(tmp_path):
    """The loss scale of mixed precision, several optimizers by name, and what mmpretrain and mmdet put into meta."""
    scaler = dict(scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, _growth_tracker=3)
    one = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9).state_dict()
    amp = dict(one, loss_scaler=scaler, base_param_settings=dict(params=[0], lr=0.1))
    for optimizer in (amp, dict(generator=amp, discriminator=one)):
        meta = dict(epoch=1, iter=9, seed=None, cfg='a = 1', dataset_meta=dict(Images.METAINFO), CLASSES=('a',))
        meta.update(mmdet_version='3.3.0', mmpretrain_version='1.2.0', experiment_name='a', time='20250101_000000')
        whole = dict(
            meta=meta, state_dict={}, optimizer=optimizer, param_schedulers=dict(generator=[], discriminator=[])
        )
        expected = copy.deepcopy(whole)
        torch.save(whole, tmp_path / 'a.pth')
        assert_same(read_checkpoint(tmp_path / 'a.pth'), expected)
