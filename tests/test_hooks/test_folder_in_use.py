"""The work directory of a training is its own, in a real Runner, until the training has ended or failed."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from mmengine.hooks import Hook
from test_atomic_checkpoint_hook import names, runner
from utils import is_free

from mmdet_ce.checkpoints import FolderInUseError


class Probe(Hook):
    """Notes after each epoch whether another process could train in the folder."""

    def __init__(self) -> None:
        self.free = []

    def after_train_epoch(self, runner):
        self.free.append(is_free(Path(runner.work_dir)))


class Fail(Hook):
    """Ends a training as an error in it does."""

    def before_train_epoch(self, runner):
        raise ZeroDivisionError


class Drop(Hook):
    """Gives up, in the middle of a training, what a list holds."""

    def __init__(self, held: list) -> None:
        self.held = held

    def before_train_epoch(self, runner):
        self.held.clear()
        gc.collect()


def train(work_dir: Path, epochs: int, *hooks: Hook, **kwargs) -> list[bool]:
    """Train, and return what a probe notes."""
    run, probe = runner(work_dir, epochs, **kwargs), Probe()
    for hook in (*hooks, probe):
        run.register_hook(hook)
    run.train()
    return probe.free


def test_the_folder_is_free_before_and_after(tmp_path):
    assert train(tmp_path, 2) == [False, False]
    assert is_free(tmp_path)


def test_a_runner_may_train_again(tmp_path):
    run = runner(tmp_path, 1)
    run.train()
    run.train()
    assert is_free(tmp_path) and names(tmp_path) == {'epoch_1.pth'}


def test_a_training_after_one_that_failed_in_the_same_process(tmp_path):
    """As in a notebook: the failed one is still there, and is collected while the next one trains."""
    failed = [runner(tmp_path, 1)]
    failed[0].register_hook(Fail())
    with pytest.raises(ZeroDivisionError):
        failed[0].train()
    assert not is_free(tmp_path), 'nothing tells a hook of an error; the process may train here, another may not'
    assert train(tmp_path, 2, Drop(failed)) == [False, False]
    assert is_free(tmp_path)


def test_data_loader_workers_neither_keep_nor_drop_the_folder(tmp_path):
    assert train(tmp_path, 2, num_workers=1) == [False, False]
    assert is_free(tmp_path)


def test_another_training_in_the_folder_is_refused_and_harms_nothing(tmp_path):
    class Intrude(Hook):
        def after_train_epoch(self, runner_):
            self.writing = tmp_path / '.epoch_2.pth.abcdefgh.tmp'
            self.writing.write_bytes(b'what the first training writes')
            child = os.fork()
            if not child:
                try:
                    runner(tmp_path, 3, resume=True, max_keep_ckpts=1).train()
                except FolderInUseError:
                    os._exit(3)
                os._exit(0)
            self.status = os.waitpid(child, 0)[1]

    intrude = Intrude()
    train(tmp_path, 1, intrude)
    assert os.WEXITSTATUS(intrude.status) == 3 and intrude.writing.exists()
    assert names(tmp_path) == {'epoch_1.pth'}


def test_two_runs_that_share_a_checkpoint_folder(tmp_path):
    """mmengine names the folder after the work directory's last part, which may be the same for two."""

    class Intrude(Hook):
        def after_train_epoch(self, runner_):
            child = os.fork()
            if not child:
                try:
                    runner(tmp_path / 'b' / 'run', 1, out_dir=str(tmp_path / 'out')).train()
                except FolderInUseError:
                    os._exit(3)
                os._exit(0)
            self.status = os.waitpid(child, 0)[1]

    intrude = Intrude()
    train(tmp_path / 'a' / 'run', 1, intrude, out_dir=str(tmp_path / 'out'))
    assert os.WEXITSTATUS(intrude.status) == 3
    assert train(tmp_path / 'b' / 'run', 1, out_dir=str(tmp_path / 'out')) == [False], 'afterwards it may'


def test_ranks_of_one_training_share_the_folder(tmp_path):
    """The first one takes it and writes."""
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            try:
                store = (tmp_path / 'store').as_uri()
                dist.init_process_group('gloo', init_method=store, rank=rank, world_size=2)
                run = runner(tmp_path / 'run', 2, max_keep_ckpts=1)
                run.train()
                dist.barrier()
                os._exit(0 if names(tmp_path / 'run') == {'epoch_2.pth'} else 4)
            finally:
                os._exit(5)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_the_best_checkpoint_of_the_training_that_it_was_resumed_from_stays(tmp_path):
    """``--resume OLD/epoch_1.pth --work-dir NEW``: mmengine's hook deletes the best of OLD."""
    for hook in ('AtomicCheckpointHook', 'CheckpointHook'):
        old, new = tmp_path / hook / 'old', tmp_path / hook / 'new'
        runner(old, 1, hook=hook, save_best='acc').train()
        run = runner(new, 3, hook=hook, resume=True, load_from=str(old / 'epoch_1.pth'), save_best='acc')
        run.train()
        assert names(new) == {'epoch_2.pth', 'epoch_3.pth', 'best_acc_epoch_3.pth'}
        assert ('best_acc_epoch_1.pth' in names(old)) is (hook == 'AtomicCheckpointHook')
