"""One training at a time in a folder, seen from processes that fork, fail and are killed."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from utils import is_free

from mmdet_ce.checkpoints import FolderInUseError, lock_folder


def test_another_process_is_refused_until_the_lock_is_given_back(tmp_path):
    lock = lock_folder(tmp_path)
    assert lock is not None and not is_free(tmp_path) and is_free(tmp_path.parent)
    del lock
    assert is_free(tmp_path)


def test_a_kill_gives_the_lock_back(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        lock = lock_folder(tmp_path)
        os.write(writer, b'x' if lock else b'')
        signal.pause()
        os._exit(0)
    os.read(reader, 1)
    with pytest.raises(FolderInUseError, match=f'another training writes to {tmp_path}; .*--work-dir'):
        lock_folder(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert lock_folder(tmp_path) is not None


def test_the_same_process_shares_its_lock(tmp_path):
    """Closing a second descriptor of the file would drop the lock of the first, which is how the system has it."""
    first = lock_folder(tmp_path)
    link = tmp_path / 'link'
    link.symlink_to(tmp_path)
    second = lock_folder(link)
    assert second is first
    del first
    gc.collect()
    assert not is_free(tmp_path), 'one of the two still holds it'
    del second
    assert is_free(tmp_path)


def test_a_forked_worker_neither_keeps_nor_drops_the_lock(tmp_path):
    lock = lock_folder(tmp_path)
    reader, writer = os.pipe()
    worker = os.fork()
    if not worker:  # like a data loader's, with a copy of all that is open
        os.close(writer)
        os.read(reader, 1)  # until the parent closes its end
        os._exit(0)
    short = os.fork()
    if not short:
        del lock
        gc.collect()
        os._exit(0)
    os.waitpid(short, 0)
    assert not is_free(tmp_path), 'what a worker closes is its own'
    del lock
    assert is_free(tmp_path), 'though a worker is alive'
    os.close(writer)
    os.waitpid(worker, 0)


def test_no_lock_where_none_can_be(tmp_path):
    assert lock_folder(tmp_path / 'not there') is None
