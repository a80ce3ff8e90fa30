"""Files are written whole or not at all, and a training that is killed resumes from a whole one."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from make_shapes_dataset import make_dataset
from mmengine.fileio import get_file_backend
from tool_runs import DEMO, MMDET_TOOLS, SMALL

from mmdet_ce.checkpoints import read_checkpoint

BACKEND = get_file_backend(backend_args=dict(backend='atomic'))


def test_a_file_takes_its_place_when_it_is_whole(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'chmod', refuse)  # as some mounted shares do
    path, link = tmp_path / 'new' / 'a.pth', tmp_path / 'link'
    BACKEND.put(b'one', path)
    os.link(path, link)
    BACKEND.put(b'two', str(path))
    assert path.read_bytes() == b'two' and link.read_bytes() == b'one', 'it was written in place'
    assert os.listdir(path.parent) == ['a.pth']


def test_what_was_there_stays_where_writing_fails(tmp_path):
    path = tmp_path / 'a.pth'
    BACKEND.put(b'one', path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match='too large'):
            BACKEND.put(bytes(2000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == b'one' and os.listdir(tmp_path) == ['a.pth']


def epochs(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition('_')[2]) for path in folder.glob('epoch_*.pth'))


def train(folder: Path, is_time_to_kill: Callable[[], bool] = lambda: False) -> tuple[int, str]:
    """Train, or resume, by mmdet's own tool with the shipped checkpoint hook; return the status and the log."""
    options = [*SMALL, 'train_cfg.max_epochs=4', 'train_cfg.val_interval=9', 'train_dataloader.batch_size=1']
    command = [sys.executable, '-W', 'ignore', MMDET_TOOLS / 'train.py', DEMO, '--work-dir', 'run', '--resume']
    with open(folder / 'log', 'w') as log:
        process = subprocess.Popen([*command, '--cfg-options', *options], cwd=folder, stdout=log, stderr=log)
        while process.poll() is None:
            if is_time_to_kill():
                process.kill()
            time.sleep(0.001)
    return process.returncode, (folder / 'log').read_text()


@pytest.mark.slow
def test_a_killed_training_resumes_from_a_whole_file(tmp_path):
    """Killed while the third checkpoint is written, of which two are kept."""
    (tmp_path / 'data').mkdir()
    make_dataset(tmp_path / 'data' / 'shapes', train=4, val=1, size=64)
    run = tmp_path / 'run'

    status, log = train(tmp_path, lambda: any(run.glob('.epoch_3.pth.*')))
    assert status == -signal.SIGKILL, log[-2000:]
    assert epochs(run) == [2] and Path((run / 'last_checkpoint').read_text()).name == 'epoch_2.pth'
    assert read_checkpoint(run / 'epoch_2.pth')['meta']['epoch'] == 2
    status, log = train(tmp_path)
    assert status == 0 and 'resumed epoch: 2' in log
    assert epochs(run) == [3, 4]
