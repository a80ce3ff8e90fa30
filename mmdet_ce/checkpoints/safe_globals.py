"""Let torch's weights-only unpickler read what mmengine's training checkpoints hold beside tensors.

These are mmengine's histories of the log, numpy's arrays and numbers, and a formula of the one-cycle schedule. The real
``getattr``, ``numpy.ndarray`` and ``numpy.dtype`` must never be admitted: with them a file can run code. So each name
in a file gets a class or function of this module, which makes only what a checkpoint needs.
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any, Callable, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler

from ..compat import TORCH

NUMBERS = {np.dtype(code).str[1:] for code in '?bhilqBHILQefdFD'}  # 'f8' for instance


class _History(HistoryBuffer):
    """Becomes a HistoryBuffer with the numbers of a file. The functions in the file are dropped: the class has them."""

    def __setstate__(self, state: dict) -> None:
        self.__init__(state['_log_history'], state['_count_history'], state['max_length'])
        self.__class__ = HistoryBuffer


class _Dtype:
    """A dtype of numbers: without objects and fields, which read memory as pointers."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in NUMBERS:
            raise UnpicklingError(f'the checkpoint has an array of type {code!r}; expected numbers')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array of numbers. The file makes it empty and fills it later."""

    def __new__(cls, *_: Any) -> _Array:
        return super().__new__(cls, 0, 'b1')

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, _real(dtype), is_fortran, data))

    def __reduce__(self) -> tuple:  # so that no file names this class
        return np.asarray(self).__reduce__()


class _OneCycle:
    """OneCycleParamScheduler as the owner of its formulas."""


def _real(dtype: _Dtype) -> np.dtype:
    if type(dtype) is not _Dtype:
        raise UnpicklingError(f'the checkpoint has an array whose type is a {type(dtype).__name__}')
    return dtype.dtype


def _scalar(dtype: _Dtype, data: bytes) -> np.number:
    (value,) = np.frombuffer(data, _real(dtype))
    return value


def _getattr(owner: type, name: str) -> Callable:
    if owner is _History and name in ('min', 'max', 'current', 'mean'):
        return getattr(HistoryBuffer, name)
    if owner is _OneCycle and name in ('_annealing_cos', '_annealing_linear'):
        return getattr(OneCycleParamScheduler, name)
    raise UnpicklingError(f'the checkpoint asks for the attribute {name!r} of {owner!r}')


def _name_of(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'


SAFE_GLOBALS: list[tuple[Union[type, Callable], str]] = [
    (_History, _name_of(HistoryBuffer)),
    (_OneCycle, _name_of(OneCycleParamScheduler)),
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
