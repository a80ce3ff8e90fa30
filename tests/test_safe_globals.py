"""mmengine's checkpoints load with weights_only; anything else is refused and never runs."""

from __future__ import annotations

import contextlib
import pickle

import hostile
import numpy as np
import pytest
import torch
from hostile import Calls
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR
from mmengine.runner import CheckpointLoader

from mmdet_ce.safe_globals import SAFE_GLOBALS


def test_history_buffer_round_trip(tmp_path):
    buffer = HistoryBuffer()
    for value in (1.0, 2.0, 4.0):
        buffer.update(value)
    torch.save({'message_hub': {'loss': buffer}, 'iter': np.int64(3), 'lr': np.float64(0.5)}, tmp_path / 'a.pth')
    loaded = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert loaded['message_hub']['loss'].mean() == pytest.approx(7 / 3)
    assert loaded['message_hub']['loss'].statistics('max') == 4
    assert loaded['iter'] == 3 and loaded['lr'] == 0.5


@pytest.mark.parametrize('strategy', ['cos', 'linear'])
def test_one_cycle_schedule_round_trip(strategy, tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = OneCycleLR(optimizer, eta_max=1.0, total_steps=10, anneal_strategy=strategy)
    torch.save(scheduler.state_dict(), tmp_path / 'a.pth')
    scheduler.load_state_dict(torch.load(tmp_path / 'a.pth', weights_only=True))


@pytest.mark.parametrize(
    'array',
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array(3.0, dtype='f4'),
        np.arange(10, dtype='i4')[::2] > 3,
    ],
)
def test_array_round_trip(array, tmp_path):
    """It is an array like any other, and is saved as one again."""
    for number in range(2):
        torch.save({'array': array}, tmp_path / f'{number}.pth')
        loaded = torch.load(tmp_path / f'{number}.pth')['array']
        assert loaded.dtype == array.dtype and np.array_equal(loaded, array)
        array = loaded
    assert (tmp_path / '0.pth').read_bytes() == (tmp_path / '1.pth').read_bytes().replace(b'1/', b'0/')


def test_every_global_is_needed(tmp_path):
    """A checkpoint of a training names all that is admitted: without any one it does not load."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedulers = [OneCycleLR(optimizer, 1.0, total_steps=9, anneal_strategy=kind) for kind in ('cos', 'linear')]
    arrays = [np.zeros(1, dtype) for dtype in ('f4', 'f8', 'i4', 'i8', 'b1')]
    content = dict(loss=HistoryBuffer([1.0], [1]), eta=np.float64(3), arrays=arrays)
    content['schedulers'] = [scheduler.state_dict() for scheduler in schedulers]
    torch.save(content, tmp_path / 'a.pth')
    other_numpy = 'numpy.core.' if np.__version__ >= '2' else 'numpy._core.'
    needed = [g for g in SAFE_GLOBALS if not (isinstance(g, tuple) and g[1].startswith(other_numpy))]
    assert len(needed) == len(SAFE_GLOBALS) - 2
    admitted = torch.serialization.get_safe_globals()
    try:
        for one in needed:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([g for g in admitted if g != one])
            with pytest.raises(pickle.UnpicklingError):
                pytest.fail(f'{one} is not needed: {torch.load(tmp_path / "a.pth")}')
    finally:
        torch.serialization.add_safe_globals(admitted)
    torch.load(tmp_path / 'a.pth')


def test_hostile_files_do_what_they_claim(tmp_path):
    """Read without care, they run: what is refused below is not refused for being broken."""
    marker, path = tmp_path / 'marker', tmp_path / 'a.pth'
    files = hostile.live(marker)
    assert len(files) >= 30
    for name, content in files.items():
        path.write_bytes(content)
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        assert marker.exists(), name
        marker.unlink()


def test_hostile_files_are_refused(hostile_files):
    """By torch.load itself and by mmengine's loader, which every tool of the framework uses."""
    paths, marker = hostile_files
    bombs = {'a compressed bomb', 'an overlapping bomb'}  # refused before torch.load sees them
    for name, path in paths.items():
        for load in (torch.load, CheckpointLoader.load_checkpoint):
            if name not in bombs:
                with pytest.raises(Exception):  # noqa: B017 - of any kind
                    pytest.fail(f'{name}: {load(path if load is torch.load else str(path))}')
            assert not marker.exists(), name


def test_a_file_cannot_change_the_framework(tmp_path):
    """mmengine's and numpy's own loading let a file replace functions of a class, or what a dtype means."""
    mean = HistoryBuffer._statistics_methods['mean']
    state = {**HistoryBuffer([1.0], [1]).__getstate__(), 'statistics_methods': {'mean': torch.Tensor}}
    forged = (3, '<', None, ('a',), {'a': (np.dtype('f4'), 0)}, 8, 1, 1)
    content = [Calls(HistoryBuffer, state=state), Calls(np.dtype, 'f8', False, True, state=forged)]
    torch.save(content, tmp_path / 'a.pth')
    history, saved = torch.load(tmp_path / 'a.pth')
    assert HistoryBuffer._statistics_methods['mean'] is mean and history.statistics('mean') == 1
    assert type(history) is HistoryBuffer and type(history._log_history) is np.ndarray
    assert saved.dtype == np.dtype('f8') and np.dtype('f8').fields is None


def test_torch_load_is_not_replaced():
    assert torch.load.__module__ == 'torch.serialization'
