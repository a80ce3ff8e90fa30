"""Files are written whole or not at all."""

from __future__ import annotations

import os
import resource
import signal

import pytest
from mmengine.fileio import get_file_backend

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


def test_each_writer_has_its_own_file_beside(tmp_path, monkeypatch):
    """Two trainings that write one file: each puts a whole one in place."""
    beside = []
    monkeypatch.setattr(os, 'fsync', lambda number: beside.extend(os.listdir(tmp_path)))
    BACKEND.put(b'one', tmp_path / 'a.pth')
    BACKEND.put(b'two', tmp_path / 'a.pth')
    first, *_, second = sorted(name for name in beside if name != 'a.pth')
    assert first != second and os.listdir(tmp_path) == ['a.pth']
