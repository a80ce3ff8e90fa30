"""mmengine's checkpoints load with weights_only; anything else is refused and never runs."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import mmdet_ce  # noqa: F401


class Calls:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


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
    from mmengine.optim import OneCycleLR

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = OneCycleLR(optimizer, eta_max=1.0, total_steps=10, anneal_strategy=strategy)
    torch.save(scheduler.state_dict(), tmp_path / 'a.pth')
    scheduler.load_state_dict(torch.load(tmp_path / 'a.pth', weights_only=True))


HOSTILE = {
    'os.system': Calls(os.system, 'touch {marker}'),
    'eval': Calls(eval, "open('{marker}', 'w')"),
    'exec': Calls(exec, "open('{marker}', 'w')"),
    'open': Calls(open, '{marker}', 'w'),
    'getattr of another object': Calls(getattr, Calls(__import__, 'os'), 'system'),
    'getattr of HistoryBuffer': Calls(getattr, HistoryBuffer, '__init__'),
    'getattr chain': Calls(getattr, Calls(getattr, HistoryBuffer, 'mean'), '__globals__'),
    'torch.load without weights_only': Calls(torch.load, '{marker}'),
    'nested': {'state_dict': [{'a': Calls(os.system, 'touch {marker}')}]},
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickle_is_refused(name, tmp_path):
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'

    def fill(value):
        if isinstance(value, Calls):
            function, args = value.call
            return Calls(fill(function), *(a.format(marker=marker) if isinstance(a, str) else fill(a) for a in args))
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        return [fill(v) for v in value] if isinstance(value, list) else value

    torch.save({'state_dict': {'w': torch.zeros(1)}, 'payload': fill(HOSTILE[name])}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)
    assert not marker.exists()


def test_torch_load_is_not_replaced():
    assert torch.load.__module__ == 'torch.serialization'
