"""Which checkpoint a training is resumed from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mmdet_ce.checkpoints import CheckpointFileError, read_checkpoint
from mmdet_ce.checkpoints.resume import prepare_resume, read_training


@pytest.fixture
def run(tmp_path) -> Path:
    """A work directory with three checkpoints, the last one named."""
    for epoch in (1, 2, 3):
        meta = dict(time=f'20250101_00000{4 - epoch}', iter=10 * epoch, epoch=epoch, experiment_name='a')
        path = tmp_path / f'epoch_{epoch}.pth'
        torch.save(dict(meta=meta, state_dict=dict(w=torch.zeros(1000))), path)
        os.utime(path, (epoch, epoch))
    name(tmp_path, tmp_path / 'epoch_3.pth')
    return tmp_path


def name(run: Path, text: str | Path, time: float = 4) -> None:
    (run / 'last_checkpoint').write_text(str(text))
    os.utime(run / 'last_checkpoint', (time, time))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def named(run: Path) -> str:
    return Path((run / 'last_checkpoint').read_text()).name


def test_all_is_well(run):
    assert prepare_resume(run) is None
    assert named(run) == 'epoch_3.pth' and (run / 'last_checkpoint').stat().st_mtime == 4, 'not written again'


@pytest.mark.parametrize('damage', [truncate, flip, Path.unlink, lambda path: path.write_bytes(b'')])
def test_named_one_is_damaged(damage, run):
    damage(run / 'epoch_3.pth')
    note = prepare_resume(run)
    assert note.startswith(f'resuming from {run / "epoch_2.pth"}, the newest whole checkpoint') and '\n' not in note
    assert 'epoch_3.pth ' in note and named(run) == 'epoch_2.pth'
    assert prepare_resume(run) is None


def test_nothing_named(run):
    name(run, '')
    assert 'epoch_3.pth' in prepare_resume(run) and named(run) == 'epoch_3.pth'
    (run / 'last_checkpoint').unlink()
    assert 'last_checkpoint named none' in prepare_resume(run) and named(run) == 'epoch_3.pth'


def test_killed_before_the_newest_was_named(run):
    name(run, run / 'epoch_2.pth', time=2.5)
    assert 'epoch_2.pth' in prepare_resume(run) and named(run) == 'epoch_3.pth'


def test_checkpoints_of_an_older_training(run):
    """They may be further on, and of another start of a training: what was named goes on."""
    other = read_checkpoint(run / 'epoch_3.pth')
    other['meta'].update(iter=9000, epoch=9, experiment_name='b')
    torch.save(other, run / 'epoch_9.pth')
    assert prepare_resume(run) is None and named(run) == 'epoch_3.pth'
    truncate(run / 'epoch_3.pth')
    assert 'epoch_2.pth' in prepare_resume(run) and named(run) == 'epoch_2.pth', 'nor are they behind it'


def test_a_clock_that_stepped_back(run):
    """The time that a checkpoint names, and those of the files, decide nothing: see the fixture."""
    os.utime(run / 'epoch_1.pth', (10**9, 10**9))
    name(run, run / 'epoch_1.pth', time=0)
    assert 'epoch_3.pth' in prepare_resume(run) and named(run) == 'epoch_3.pth'


@pytest.mark.parametrize('text', ['x' * 5000, '/dev/null', '/', '\0', '../' * 2000])
def test_a_name_that_is_none(run, text):
    name(run, text)
    assert 'epoch_3.pth' in prepare_resume(run) and named(run) == 'epoch_3.pth'


@pytest.mark.parametrize('kind', ['pipe', 'folder', 'loop'])
def test_a_last_checkpoint_that_is_no_file(run, kind):
    last = run / 'last_checkpoint'
    last.unlink()
    {'pipe': os.mkfifo, 'folder': os.mkdir, 'loop': lambda path: path.symlink_to(path)}[kind](last)
    with pytest.raises(CheckpointFileError, match='last_checkpoint is no file; expected a text file'):
        prepare_resume(run)


def test_moved_and_copied_folder(run, tmp_path):
    """The name is that of the old place."""
    name(run, '/another/place/epoch_3.pth')
    for epoch in (1, 2, 3):
        os.utime(run / f'epoch_{epoch}.pth', (10 - epoch, 10 - epoch))
    assert 'epoch_3.pth not found' in prepare_resume(run) and named(run) == 'epoch_3.pth'


def test_other_files_are_no_candidates(run):
    other = read_checkpoint(run / 'epoch_3.pth')
    other['meta']['time'] = '20990101_000000'
    for file in ('best_acc_epoch_3.pth', 'calibrated.pth', '.epoch_4.pth.abcdefgh.tmp'):
        torch.save(other, run / file)
    torch.save(dict(state_dict={}), run / 'epoch_9.pth')
    name(run, '')
    assert 'epoch_9.pth is not a checkpoint of a training' in prepare_resume(run) and named(run) == 'epoch_3.pth'


def test_no_whole_one(run):
    for path in run.glob('*.pth'):
        truncate(path)
    with pytest.raises(CheckpointFileError, match=r'no whole checkpoint to resume from in .*epoch_1.pth is incomplete'):
        prepare_resume(run)
    for path in run.glob('*.pth'):
        path.unlink()
    with pytest.raises(CheckpointFileError, match='epoch_3.pth not found'):
        prepare_resume(run)
    name(run, '')
    with pytest.raises(CheckpointFileError, match='last_checkpoint named none'):
        prepare_resume(run)


def test_new_training_and_remote_checkpoints(tmp_path):
    assert prepare_resume(tmp_path / 'none') is None
    assert prepare_resume(tmp_path) is None
    name(tmp_path, 's3://bucket/epoch_3.pth')
    assert prepare_resume(tmp_path) is None


def test_files_that_are_no_checkpoints_to_resume_from(run):
    """A published file has the newest time, and neither optimizer nor schedule."""
    (run / 'epoch_3-24d32017.pth').write_bytes((run / 'epoch_3.pth').read_bytes())
    (run / 'epoch_11.pth').symlink_to(run / 'gone.pth')
    assert prepare_resume(run) is None and named(run) == 'epoch_3.pth'
    (run / 'last_checkpoint').write_bytes(b'\xff\x00')
    assert 'epoch_3.pth' in prepare_resume(run) and named(run) == 'epoch_3.pth'


def test_a_time_that_is_none(run):
    torch.save(dict(meta=dict(time=None, iter=40)), run / 'epoch_4.pth')
    assert prepare_resume(run) is None and named(run) == 'epoch_3.pth', 'of no known start of a training'


@pytest.mark.parametrize('lost', ['meta', 'epoch', 'iter', 'state_dict'])
def test_weights_alone_are_no_training(run, lost):
    whole = read_checkpoint(run / 'epoch_3.pth')
    for part in (whole, whole['meta']):
        part.pop(lost, None)
    torch.save(whole, run / 'weights.pth')
    with pytest.raises(CheckpointFileError, match='weights.pth is not a checkpoint of a training .*load_from'):
        read_training(run / 'weights.pth')
