"""Let torch's weights-only unpickler read what mmengine's training checkpoints hold beside tensors.

These are histories of the log, numpy's arrays and numbers, and the formulas of the one-cycle schedule. The real
``getattr``, ``numpy.ndarray`` and ``numpy.dtype`` must never be admitted: with them a file can run code. So each name
in a file means a class or function of this module, which makes only what a checkpoint needs. None of them returns a
class, a module or a function: torch sets attributes, as a file names them, on what an admitted name returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Number
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler

from ..compat import TORCH

NUMBERS = {np.dtype(code).str[1:] for code in '?bhilqBHILQefdFD'}  # 'f8' for instance


class _History(HistoryBuffer):
    """A history of numbers. The functions in its state are dropped: they would go into the class of all histories."""

    def __init__(self) -> None:
        """Wait for the state."""

    def __setstate__(self, state: dict) -> None:
        numbers, counts = state['_log_history'], state['_count_history']
        if not (isinstance(numbers, np.ndarray) and isinstance(counts, np.ndarray)):
            raise UnpicklingError('the checkpoint has a history that is no array')
        super().__init__(numbers, counts, state['max_length'])
        self.__class__ = HistoryBuffer


@dataclass(frozen=True)
class _Formula:
    """A function of mmengine's that a file can name and a scheduler can call; it returns numbers alone."""

    owner: type
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> float:
        if not all(isinstance(value, (Number, HistoryBuffer)) for value in (*args, *kwargs.values())):
            raise TypeError(f'{self.name} takes numbers, got {args} and {kwargs}')
        return float(getattr(self.owner, self.name)(*args, **kwargs))

    def __reduce__(self) -> tuple:
        return getattr, (self.owner, self.name)  # as pickle writes the function itself


class _OneCycle:
    """Stands for the class whose formulas a file names."""

    _annealing_cos = _Formula(OneCycleParamScheduler, '_annealing_cos')
    _annealing_linear = _Formula(OneCycleParamScheduler, '_annealing_linear')


def _getattr(owner: Any, name: str) -> _Formula:
    """Return a formula by its name, whose owner may be a class of mmengine or what stands for it here."""
    if owner in (_History, HistoryBuffer) and name in ('min', 'max', 'current', 'mean'):
        return _Formula(HistoryBuffer, name)
    if owner in (_OneCycle, OneCycleParamScheduler) and name in ('_annealing_cos', '_annealing_linear'):
        return _Formula(OneCycleParamScheduler, name)
    raise UnpicklingError(f'the checkpoint asks for the attribute {name!r} of {owner!r}')


class _Dtype:
    """The type of an array, by its code alone.

    A user may have admitted the real numpy.dtype and its companions too, as advice on the web says. Then torch takes
    either of the two objects that the name 'numpy.dtype' means, by chance, and numpy's own functions take a real dtype
    only. So in that process this class makes real ones.
    """

    def __new__(cls, *args: Any) -> Any:
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
    """An array of numbers, which the file fills after it is made."""

    def __new__(cls, *_: Any) -> _Array:
        return super().__new__(cls, 0, 'b1')

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, _real(dtype), is_fortran, data))

    def __reduce__(self) -> tuple:
        return np.asarray(self).__reduce__()  # so that no file names this class


def _scalar(dtype: Any, data: bytes) -> np.number:
    (value,) = np.frombuffer(data, _real(dtype))
    return value


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
