"""Checkpoints are read as data and written whole."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import torch

from mmdet_ce.checkpoints import (
    CheckpointFileError,
    read_checkpoint,
    sha256,
    write_checkpoint,
)


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'not found'),
        (b'', 'is empty; get it again'),
        (b'not a checkpoint', 'is incomplete, damaged or no checkpoint .ValueError: torch.save did not write it.'),
        ('truncated', 'is incomplete, damaged or no checkpoint'),
    ],
)
def test_unreadable_files(content, message, tmp_path):
    path = tmp_path / 'a.pth'
    if content == 'truncated':
        torch.save({'w': torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointFileError, match=message):
        read_checkpoint(path)


def test_damage_is_found(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.full((100,), 7.0), 'b': torch.full((50,), 7.0)}, path)
    data = path.read_bytes()
    read_checkpoint(path)
    for length in (2, *range(50, len(data), 50), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointFileError, match='is incomplete, damaged or no checkpoint'):
            read_checkpoint(path)
    value = torch.tensor(7.0).numpy().tobytes()
    for position in (data.index(value), data.rindex(value)):
        path.write_bytes(data[:position] + b'x' + data[position + 1 :])
        with pytest.raises(CheckpointFileError, match='damaged'):
            read_checkpoint(path)
    with pytest.raises(CheckpointFileError, match='is no file'):
        read_checkpoint(tmp_path)


def test_round_trip_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / 'new' / 'a.pth'
    for value in (1.0, 2.0):
        write_checkpoint({'w': torch.tensor(value)}, path)
        assert read_checkpoint(path)['w'] == value
    assert [p.name for p in path.parent.iterdir()] == ['a.pth']
    assert len(sha256(path)) == 64
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_full_disk_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands in for a full disk: the system call fails the same way, in the middle."""
    path = tmp_path / 'a.pth'
    write_checkpoint({'w': torch.tensor(1.0)}, path)
    script = (
        'import sys, torch; from mmdet_ce.checkpoints import *\n'
        f'try: write_checkpoint(dict(w=torch.zeros(1 << 20)), {str(path)!r})\n'
        'except CheckpointFileError as error: sys.exit(str(error))'
    )
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', script],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )  # fmt: skip
    assert result.returncode == 1 and 'could not be written' in result.stderr and 'Traceback' not in result.stderr
    assert read_checkpoint(path)['w'] == 1
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path):
    path = tmp_path / 'a.pth'
    write_checkpoint({'w': torch.tensor(1.0)}, path)
    script = (
        'import os, signal, torch; from mmdet_ce.checkpoints import *\n'
        'save = torch.save\n'
        'def half(checkpoint, file): save(checkpoint, file); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n'
        'torch.save = half\n'
        f'write_checkpoint(dict(w=torch.zeros(9)), {str(path)!r})'
    )
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', script]).returncode == -9
    assert read_checkpoint(path)['w'] == 1
    assert [p.suffix for p in tmp_path.iterdir() if p != path] == ['.tmp'], 'never under the name of a checkpoint'


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(CheckpointFileError, match='could not be written .a device, not a file.'):
        write_checkpoint({}, tmp_path / 'pipe')
    assert (tmp_path / 'pipe').is_fifo() and len(list(tmp_path.iterdir())) == 1
