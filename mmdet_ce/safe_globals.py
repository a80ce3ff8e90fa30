"""Let ``torch.load(weights_only=True)`` read mmengine's checkpoints.

Since torch 2.6 a checkpoint is read by an unpickler that admits tensors and plain containers only. Beside those, a
training checkpoint of mmengine holds its message hub, ``HistoryBuffer`` objects over numpy arrays, and, with the
one-cycle schedule, that scheduler's two annealing functions. Exactly these are admitted here, through torch's public
allow-list; nothing of torch is replaced, and a file that asks for anything else is refused before any of it runs.

What a file calls by these names are stand-ins that do no more than it needs. The originals would let it replace
functions of ``HistoryBuffer`` for the whole process, forge a dtype whose numbers are taken for objects, or free the
memory that another array looks at.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

# a function of a class is pickled as getattr(class, name)
FUNCTIONS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}
NUMBERS = {code: np.dtype(code) for code in ('f4', 'f8', 'i4', 'i8', 'b1')}


class SavedHistoryBuffer(HistoryBuffer):
    """``HistoryBuffer`` in checkpoints: its histories, and the statistics functions of this process, not the file's."""

    def __setstate__(self, state: dict) -> None:
        """Become a plain ``HistoryBuffer`` of the saved values."""
        super().__init__(state['_log_history'], state['_count_history'], state['max_length'])
        self.__class__ = HistoryBuffer


class SavedArray(np.ndarray):
    """``numpy.ndarray`` in checkpoints, and the call that makes one: made empty, and filled with numbers once."""

    def __new__(cls, *args: Any) -> SavedArray:
        """Return an empty array for the arguments that every pickled array has: a class, (0,) and a type code."""
        if args[1:2] != ((0,),):
            raise pickle.UnpicklingError(f'a checkpoint may not ask for numpy.ndarray{args!r}')
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        """Take shape and values: once, since what looks at the first ones would then look at freed memory."""
        if self.size:
            raise pickle.UnpicklingError('a checkpoint may not fill an array twice')
        version, shape, saved, *rest = state
        super().__setstate__((version, shape, saved.dtype, *rest))

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Be saved as a plain array again."""
        return self.view(np.ndarray).__reduce_ex__(protocol)


class NumberDtype:
    """``numpy.dtype`` in checkpoints: that of a plain number, in this machine's byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or code not in NUMBERS:
            raise pickle.UnpicklingError(f'a checkpoint may not ask for numpy.dtype({code!r})')
        self.dtype = NUMBERS[code]

    def __setstate__(self, state: tuple) -> None:
        """Check the byte order, the one thing in the state that a plain number has."""
        if self.dtype.newbyteorder(state[1]) != self.dtype:
            raise pickle.UnpicklingError(f'a checkpoint may not hold numbers of byte order {state[1]!r}')


def number(saved: NumberDtype, data: bytes) -> np.generic:
    """Stand in for numpy's ``scalar``: return the number that ``data`` holds, and never the object that it could be."""
    (value,) = np.frombuffer(data, saved.dtype)
    return value


def getattr_of_mmengine(obj: Any, name: str) -> Any:
    """Stand in for ``getattr`` in checkpoints: it knows the functions that mmengine's own checkpoints ask for.

    Args:
        obj: The class that the file asks a function of.
        name: The function's name.

    Returns:
        The function.

    Raises:
        pickle.UnpicklingError: For any other object or name.
    """
    for cls, names in FUNCTIONS.items():
        if isinstance(obj, type) and issubclass(obj, cls) and name in names:
            return getattr(cls, name)
    raise pickle.UnpicklingError(f'a checkpoint may not ask for getattr({obj!r}, {name!r})')


# what torch admits: classes by their own name, and stand-ins by the name that a checkpoint calls them
SAFE_GLOBALS = [
    OneCycleParamScheduler,
    (SavedHistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (getattr_of_mmengine, 'builtins.getattr'),
    (SavedArray, 'numpy.ndarray'),
    (NumberDtype, 'numpy.dtype'),
    # numpy renamed its core in version 2, and a checkpoint names it as the numpy that wrote it did
    *((SavedArray, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *((number, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
]


def register_safe_globals() -> None:
    """Admit what mmengine's checkpoints contain; safe to call again.

    Who admits numpy's own names, too, leaves it to chance whether torch takes the stand-in or the original: it keeps a
    set.
    """
    torch.serialization.add_safe_globals(SAFE_GLOBALS)
