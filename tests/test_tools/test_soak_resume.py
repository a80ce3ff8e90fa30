"""What the soak checks with: its comparison of states, and its hook, in a real Runner with a CE backbone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import soak_hook  # noqa: F401 - registers SoakHook
import torch
from mmdet.registry import DATASETS
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from soak_resume import summarize
from soak_training import STATE, as_saved, checkpoints, equal

from mmdet_ce import CEResNet
from mmdet_ce.checkpoints import read_checkpoint


class CEModel(BaseModel):
    """The least that has CE, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.backbone = CEResNet(depth=18, base_channels=8, norm_eval=False, frozen_stages=-1)

    def forward(self, x, mode='tensor'):
        return dict(loss=self.backbone(torch.stack(x) + torch.rand(2, 3, 32, 32))[-1].square().mean())


@DATASETS.register_module()
class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(x=index + torch.rand(3, 32, 32))


def train(work_dir, epochs, seed=0, **kwargs):
    torch.manual_seed(0)
    runner = Runner(
        model=CEModel(),
        work_dir=str(work_dir),
        train_dataloader=dict(dataset=dict(type='Noise'), batch_size=2, sampler=dict(type='DefaultSampler')),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=4, end=4),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=1)),
        custom_hooks=[dict(type='SoakHook', seed=seed)],
        randomness=dict(seed=0),
        default_scope='mmdet',
        experiment_name=f'{work_dir.name}-{epochs}-{seed}',
        log_level='ERROR',
        **kwargs,
    )
    runner.train()
    (checkpoint,) = checkpoints(work_dir)[0].values()
    return checkpoint


@pytest.mark.slow
def test_resumed_training_continues_and_ends_as_one_left_alone(tmp_path):
    """All that is saved is loaded to the bit, and the resumed training equals an uninterrupted one."""
    alone = train(tmp_path / 'alone', 4)
    saved = train(tmp_path / 'resumed', 2)
    final = train(tmp_path / 'resumed', 4, resume=True)
    loaded = read_checkpoint(tmp_path / 'resumed' / 'soak' / 'resumed.pth')
    assert (tmp_path / 'resumed' / 'soak' / 'iterations').read_text() == '8'
    assert as_saved(loaded, saved) and not as_saved(loaded, final) and not as_saved(loaded, alone)
    for key in STATE:
        assert equal(final[key], alone[key]), key
        assert not equal(final[key], saved[key]), f'{key} did not change in two epochs'
    changed = {key for key, value in final['state_dict'].items() if not equal(value, saved['state_dict'][key])}
    assert any('running_whitening' in key for key in changed)
    other = train(tmp_path / 'other', 2, seed=1)
    assert not equal(other['state_dict'], saved['state_dict']), 'the seed has something to say'


@pytest.mark.parametrize(
    'change',
    [
        lambda state: state['w'].view(torch.int32).bitwise_xor_(1),
        lambda state: state.update(w=state['w'].double()),
        lambda state: state.update(w=state['w'].reshape(1, 2)),
        lambda state: state.update(zero=torch.tensor(-0.0)),
        lambda state: state['log'].update(2.0),
        lambda state: state['list'][1].pop('a'),
        lambda state: state['list'].append(1),
        lambda state: state['array'].__setitem__(0, 2),
        lambda state: state.update(number=1),
        lambda state: state.update(more=0),
    ],
)
def test_equal(change):
    state = dict(
        w=torch.tensor([1.0, float('nan')]), zero=torch.tensor(0.0), log=HistoryBuffer([1.0], [1]), list=[0, dict(a=1)],
        array=np.zeros(2), number=1.0,
    )  # fmt: skip
    other = copy.deepcopy(state)
    assert equal(state, other)
    change(other)
    assert not equal(state, other)


def test_checkpoints_and_summary(tmp_path):
    for epoch in (10, 9):
        torch.save(dict(meta=dict(iter=epoch)), tmp_path / f'epoch_{epoch}.pth')
    (tmp_path / 'epoch_11.pth').write_bytes((tmp_path / 'epoch_10.pth').read_bytes()[:-9])
    whole, damaged = checkpoints(tmp_path)
    assert list(whole) == ['epoch_9.pth', 'epoch_10.pth'] and damaged == ['epoch_11.pth']

    life = dict(ended=False, killed_in='writing', resumed=8, damaged=[], lost_checkpoint=False, lost_iterations=3)
    end = dict(life, ended=True, killed_in=None, lost_iterations=0)
    bad = dict(life, killed_in='training', as_saved=False, damaged=['epoch_1.pth'], lost_checkpoint=True)
    assert summarize([life, bad, end]) == {
        'kills': 2,
        'killed in start-up': 0,
        'killed in training': 1,
        'killed in writing': 1,
        'resumes': 3,
        'resumed not as saved': 1,
        'damaged checkpoints': 1,
        'checkpoints lost': 1,
        'iterations trained again': 6,
    }
