"""Checkpoints of a real Runner that is killed in the middle of writing one."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from checkpoint_runs import Linear
from mmdet.registry import DATASETS, METRICS
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_ce import AtomicCheckpointHook
from mmdet_ce.checkpoints import CheckpointFileError, read_checkpoint

ENOUGH = 1 << 17  # bytes: for logs, and not for a checkpoint


def find_damage(path: Path) -> str:
    """Return what is wrong with a checkpoint, '' for a whole one."""
    try:
        read_checkpoint(path)
    except CheckpointFileError as error:
        return str(error)
    return ''


@DATASETS.register_module()
class Vectors(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(x=torch.full((300,), float(index)))


@METRICS.register_module()
class Better(BaseMetric):
    """Two scores: one better in every epoch, one only in the first."""

    def __init__(self):
        super().__init__()
        self.epoch = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.epoch += 1
        return dict(acc=self.epoch, top=-self.epoch)


class KillInWriting(Hook):
    """From an epoch on, let the system kill this process in the middle of a file that is too long."""

    priority = 'HIGHEST'

    def __init__(self, epoch: int, best: bool) -> None:
        self.epoch, self.best = epoch, best

    def before_train_epoch(self, runner):
        if not self.best and runner.epoch + 1 == self.epoch:
            self.limit()

    def before_val(self, runner):
        if self.best and runner.epoch == self.epoch:
            self.limit()

    def limit(self):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ENOUGH, ENOUGH))


def runner(
    work_dir, epochs, hook='AtomicCheckpointHook', resume=False, load_from=None, num_workers=0, **kwargs
) -> Runner:
    loader = dict(
        dataset=dict(type='Vectors'),
        batch_size=1,
        sampler=dict(type='DefaultSampler', shuffle=False),
        num_workers=num_workers,
    )
    return Runner(
        model=Linear(300, 300),
        work_dir=str(work_dir),
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator=dict(type='Better'),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3, momentum=0.9)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg=dict(),
        default_hooks=dict(checkpoint=dict(type=hook, interval=1, **kwargs)),
        default_scope='mmdet',
        experiment_name=f'{work_dir.name}-{epochs}',
        log_level='ERROR',
        resume=resume,
        load_from=load_from,
    )


def train_and_be_killed(work_dir, epoch, best=False, **kwargs) -> None:
    """Train in a child, which is killed while it writes the checkpoint, or the best checkpoint, of an epoch."""
    child = os.fork()
    if not child:
        try:
            run = runner(work_dir, epochs=epoch, **kwargs)
            run.register_hook(KillInWriting(epoch, best))
            run.train()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGXFSZ


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob('*.pth')}


@pytest.mark.parametrize('hook', ['AtomicCheckpointHook', 'CheckpointHook'])
def test_kill_in_writing_with_one_checkpoint_kept(hook, tmp_path):
    """mmengine's hook loses everything, which shows that the kill is where it should be; this one loses nothing."""
    train_and_be_killed(tmp_path, epoch=3, hook=hook, max_keep_ckpts=1)
    if hook == 'CheckpointHook':
        assert names(tmp_path) == {'epoch_3.pth'} and 'damaged' in find_damage(tmp_path / 'epoch_3.pth')
        return
    assert names(tmp_path) == {'epoch_2.pth'} and not find_damage(tmp_path / 'epoch_2.pth')
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_2.pth')
    assert [path.stat().st_size for path in tmp_path.glob('.*.tmp')] == [ENOUGH]

    run = runner(tmp_path, epochs=4, resume=True, max_keep_ckpts=1)
    run.train()
    assert names(tmp_path) == {'epoch_4.pth'}
    assert read_checkpoint(tmp_path / 'epoch_4.pth')['meta']['iter'] == 8
    assert not list(tmp_path.glob('.*.tmp')), 'what the kill left is removed'


@pytest.mark.parametrize('hook', ['AtomicCheckpointHook', 'CheckpointHook'])
@pytest.mark.parametrize('save_best', ['acc', ['acc', 'top']])
def test_kill_in_writing_the_best_checkpoint(hook, save_best, tmp_path):
    train_and_be_killed(tmp_path, epoch=2, best=True, hook=hook, save_best=save_best)
    best = names(tmp_path) - {'epoch_1.pth', 'epoch_2.pth'} - {'best_top_epoch_1.pth'}
    if hook == 'CheckpointHook':
        assert best == {'best_acc_epoch_2.pth'} and find_damage(tmp_path / 'best_acc_epoch_2.pth')
    else:
        assert best == {'best_acc_epoch_1.pth'} and not find_damage(tmp_path / 'best_acc_epoch_1.pth')


def test_outdated_checkpoint_of_a_kill_before_its_deletion_goes_later(tmp_path):
    runner(tmp_path, epochs=2, max_keep_ckpts=1).train()
    (tmp_path / 'epoch_1.pth').write_bytes(b'not yet deleted')
    os.link(tmp_path / 'last_checkpoint', tmp_path / 'before')
    runner(tmp_path, epochs=3, resume=True, max_keep_ckpts=1).train()
    assert names(tmp_path) == {'epoch_3.pth'}
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_3.pth')
    assert (tmp_path / 'before').read_text().endswith('epoch_2.pth'), 'replaced, not written over'


def test_another_folder_for_checkpoints(tmp_path):
    runner(tmp_path / 'run', epochs=1, out_dir=str(tmp_path / 'out')).train()
    assert (tmp_path / 'run' / 'last_checkpoint').read_text() == str(tmp_path / 'out' / 'run' / 'epoch_1.pth')
    assert not find_damage(tmp_path / 'out' / 'run' / 'epoch_1.pth')


def test_a_users_own_backend_is_kept():
    hook = AtomicCheckpointHook(file_client_args=dict(backend='disk'))
    assert hook.backend_args is None and hook.file_client_args == dict(backend='disk')
    assert AtomicCheckpointHook().backend_args == dict(backend='atomic')
