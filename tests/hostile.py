"""Checkpoints that attack whoever reads them, made by the tests that need them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class Calls:
    """Pickles as a call of ``function(*args)``, whose result is then given ``state`` if there is one."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.call = (function, args, state)

    def __reduce__(self) -> tuple:
        return self.call

    def __call__(self) -> None:
        """Only what can be called may be called in a pickle."""


def live(marker: Path) -> dict[str, Any]:
    """Return contents that make the file ``marker`` when they are unpickled without care."""
    code = f'open({str(marker)!r}, "w").close()'
    found = Calls(getattr, HistoryBuffer.mean, '__globals__')
    for key in ('__builtins__', 'eval'):
        found = Calls(Calls(getattr, found, '__getitem__'), key)
    return {
        'os.system': Calls(os.system, f'touch {marker}'),
        'builtins.eval': Calls(eval, code),
        'nested': {'state_dict': {'a': [(Calls(eval, code), torch.zeros(1))]}},
        'the globals of a function': Calls(found, code),
        'an array of objects': np.array([Calls(eval, code)], dtype=object),
        'the state of a history': Calls(HistoryBuffer, state={'_log_history': Calls(eval, code)}),
    }


def forged() -> dict[str, Any]:
    """Return contents that would read memory or change a class; some crash whoever unpickles them without care."""
    empty = np.empty(0, 'b1').__reduce__()
    numbers = np.zeros(1).dtype.__reduce__()
    pointers = Calls(*numbers[:1], 'O', False, True, state=(3, '|', None, None, None, -1, -1, 63))
    fields = Calls(*numbers[:1], 'V8', False, True, state=(3, '|', None, ('a',), {'a': (np.dtype('O'), 0)}, 8, 8, 63))
    histories = dict(max_length=1, _log_history=np.zeros(1), _count_history=np.zeros(1))
    return {
        'objects from bytes': Calls(empty[0], *empty[1], state=(1, (1,), pointers, False, b'\x10' * 8)),
        'a dtype with fields': Calls(empty[0], *empty[1], state=(1, (1,), fields, False, b'\x10' * 8)),
        'the methods of a class': Calls(
            HistoryBuffer, state=dict(histories, statistics_methods=dict(mean=HistoryBuffer.max))
        ),
        'an attribute of a history': Calls(getattr, HistoryBuffer, '__init__'),
    }
