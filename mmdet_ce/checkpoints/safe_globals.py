"""Let torch's weights-only unpickler read what mmengine's training checkpoints hold beside tensors.

These are histories of the log, numpy's arrays and numbers, and the formulas of the one-cycle schedule. The real
``getattr``, ``numpy.ndarray`` and ``numpy.dtype`` must never be admitted: with them a file can run code. So each name
in a file means a class or function of this module, which makes only what a checkpoint needs.
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any, Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler

from ..compat import TORCH

STATISTICS, FORMULAS = ('min', 'max', 'current', 'mean'), ('_annealing_cos', '_annealing_linear')
NUMBERS = {np.dtype(code).str[1:] for code in '?bhilqBHILQefdFD'}  # 'f8' for instance


class _History(HistoryBuffer):
    def __setstate__(self, state: dict) -> None:
        self.__init__(state['_log_history'], state['_count_history'], state['max_length'])
        self.__class__ = HistoryBuffer


_OneCycle = type('_OneCycle', (), {name: getattr(OneCycleParamScheduler, name) for name in FORMULAS})


class _Dtype:
    def __new__(cls, *args: Any) -> Any:
        # If the user also admitted the real numpy.dtype, torch may take either of the two: both work.
        return np.dtype(*args) if np.dtype in torch.serialization.get_safe_globals() else super().__new__(cls)

    def __init__(self, code: str, *_: Any) -> None:
        self.str = code

    def __setstate__(self, state: tuple) -> None:
        self.str = state[1] + self.str  # '<f8'


def _real(dtype: Any) -> np.dtype:
    if dtype.str.lstrip('<>=|') not in NUMBERS:  # objects and fields would read memory as pointers
        raise UnpicklingError(f'the checkpoint has an array of type {dtype.str!r}; expected numbers')
    return np.dtype(dtype.str)


class _Array(np.ndarray):
    def __new__(cls, *_: Any) -> _Array:
        return super().__new__(cls, 0, 'b1')  # the file fills it later

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, _real(dtype), is_fortran, data))

    def __reduce__(self) -> tuple:
        return np.asarray(self).__reduce__()  # so that no file names this class


def _scalar(dtype: Any, data: bytes) -> np.number:
    (value,) = np.frombuffer(data, _real(dtype))
    return value


def _getattr(owner: Any, name: str) -> Callable:
    names = {_History: STATISTICS, HistoryBuffer: STATISTICS, _OneCycle: FORMULAS, OneCycleParamScheduler: FORMULAS}
    if name not in names.get(owner, ()):
        raise UnpicklingError(f'the checkpoint asks for the attribute {name!r} of {owner!r}')
    return getattr(owner, name)


SAFE_GLOBALS = [
    (_History, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_OneCycle, 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'),
    (_getattr, 'builtins.getattr'),
    (bytes, 'builtins.bytes'),  # of an empty array
    (_Array, 'numpy.ndarray'),
    (_Dtype, 'numpy.dtype'),
]
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # before numpy 2, and since
    SAFE_GLOBALS += [(_Array, f'{_module}._reconstruct'), (_scalar, f'{_module}.scalar')]


def admit_training_checkpoints() -> None:
    """Admit these names for every ``torch.load`` of the process. torch < 2.6 loads such checkpoints as pickles."""
    if TORCH >= (2, 6):
        torch.serialization.add_safe_globals(SAFE_GLOBALS)
