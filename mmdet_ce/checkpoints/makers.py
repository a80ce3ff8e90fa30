"""What a file may name, and what is made of it: closed lists, and makers that check what they are given.

A name stands for nothing but itself. What is made is tensors and arrays whose numbers are in the file, plain
containers, or ``Token``, ``History`` and ``Array``, which have no behaviour.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from .values import DTYPES, MAX_AXES, VALUES

MAX_NUMEL = 1 << 40  # of an expanded tensor; torch's own count ends at 2**63, and schema.py counts the bytes
BUILTINS = ('builtins', '__builtin__')  # by Python 3 and by Python 2
TYPES = ('bool', 'dict', 'float', 'frozenset', 'int', 'list', 'set', 'str', 'tuple')
FACTORIES = {*(f'{module}.{name}' for module in BUILTINS for name in TYPES), '__builtin__.long', '__builtin__.unicode'}
STORAGES = {
    'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool,
    'ComplexFloatStorage': torch.complex64, 'ComplexDoubleStorage': torch.complex128, 'UntypedStorage': torch.uint8,
}  # fmt: skip
NUMBERS = {code: np.dtype(code) for code in ['f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1']}
HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
CONFIG_DICT = 'mmengine.config.config.ConfigDict'
ONE_CYCLE = 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'
# a function of a class is pickled as getattr(class, name), or since protocol 4 by its own name
FUNCTIONS = {HISTORY: ('min', 'max', 'current', 'mean'), ONE_CYCLE: ('_annealing_cos', '_annealing_linear')}
FUNCTION_NAMES = {f'{owner}.{name}' for owner, names in FUNCTIONS.items() for name in names}


@dataclass(frozen=True)
class Token:
    """A name in a file."""

    name: str


FUNCTION = Token('a function')


class History:
    """The saved state of a ``HistoryBuffer``."""

    state: Optional[dict] = None


class Namespace:
    """The saved attributes of an ``argparse.Namespace``, the options of a training that stand beside its weights."""

    state: Optional[dict] = None


class Array:
    """A saved array: ``values`` is set once."""

    values: Optional[np.ndarray] = None


@dataclass(frozen=True)
class Number:
    """The type of the numbers in an array."""

    dtype: np.dtype


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any = None, _hooks: Any = None, *bits: Any
) -> Tensor:
    """Return a strided tensor that fits into its storage, or repeats parts of it."""
    known = type(storage) is Tensor and storage.dim() == 1 and storage.is_contiguous()
    known = known and type(size) is type(stride) is tuple and len(size) == len(stride) <= MAX_AXES
    if not known or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError('it asks for a tensor of an unknown kind')
    if any(bits):
        raise pickle.UnpicklingError('it asks for a conjugated or negated view of a tensor')
    numel = 1
    for length in size:
        numel *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride)) if numel else 0
    if last >= max(len(storage), 1) or numel > MAX_NUMEL:
        raise pickle.UnpicklingError('it asks for a tensor that its storage does not hold')
    return storage.as_strided(size, stride, offset) if numel else storage.new_empty(size)


def _tensor_of_bytes(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *bits: Any
) -> Tensor:
    """Return a tensor of a type that has no storage of its own."""
    if type(storage) is not Tensor or type(dtype) is not Token or dtype.name not in DTYPES:
        raise pickle.UnpicklingError('it asks for a tensor of an unknown kind')
    return _tensor(storage.view(DTYPES[dtype.name]), offset, size, stride, grad, hooks, *bits)


def _parameter(data: Any, *_: Any) -> Tensor:
    if type(data) is not Tensor:
        raise pickle.UnpicklingError('it asks for a parameter without a tensor')
    return data


def _ordered_dict() -> dict:
    return {}


def _default_dict(factory: Any = None) -> dict:
    """Return a dict without what it would make of a missing key."""
    if factory is not None and (type(factory) is not Token or factory.name not in FACTORIES):
        raise pickle.UnpicklingError('it asks for a defaultdict of an unknown kind')
    return {}


def _deque(items: Any = (), length: Any = None) -> list:
    """Return a deque as a list; its items follow."""
    if type(items) is not tuple or items or not (length is None or type(length) is int):
        raise pickle.UnpicklingError('it asks for a deque of an unknown kind')
    return []


def _config_dict(items: Any) -> dict:
    if type(items) is not dict:
        raise pickle.UnpicklingError('it asks for a ConfigDict of something else than a dict')
    return items


def _counter(counts: Any = None) -> Counter:
    """Return the milestones of mmengine's MultiStepLR."""
    counts = {} if counts is None else counts
    if type(counts) is not dict or any(type(n) is not int for n in (*counts, *counts.values())):
        raise pickle.UnpicklingError('it asks for a Counter of something else than integers')
    return Counter(counts)


def _bytes(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or type(encoding) is not str or encoding != 'latin1':
        raise pickle.UnpicklingError('it asks for bytes of an unknown kind')
    return text.encode('latin1')


def _empty_bytes() -> bytes:
    return b''


def _empty_array(cls: Any, shape: Any, code: Any) -> Array:
    known = type(cls) is Token and cls.name == 'numpy.ndarray' and type(shape) is tuple and len(shape) == 1
    if not known or type(shape[0]) is not int or shape[0]:  # a tensor would compare each of its 2^40 numbers
        raise pickle.UnpicklingError('it asks for an array of an unknown kind')
    return Array()


def _array_of_bytes(data: Any, number: Any, shape: Any, order: Any) -> Array:
    """Return an array as protocol 5 writes it."""
    if type(data) is not bytes or type(shape) is not tuple or len(shape) > MAX_AXES:
        raise pickle.UnpicklingError('it asks for an array of an unknown kind')
    array = Array()
    array.values = np.frombuffer(data, dtype_of(number)).reshape(shape, order=order).copy(order='K')
    return array


def _number(code: Any, *_: Any) -> Number:
    if type(code) is not str or code not in NUMBERS:
        raise pickle.UnpicklingError('it asks for an array of something else than plain numbers')
    return Number(NUMBERS[code])


def _scalar(number: Any, data: Any) -> float:
    return np.frombuffer(data, dtype_of(number)).item()


def _function(owner: Any, name: Any) -> Token:
    if type(owner) is not Token or type(name) is not str or name not in FUNCTIONS.get(owner.name, ()):
        raise pickle.UnpicklingError('it asks for an attribute of an object')
    return FUNCTION


def dtype_of(number: Any) -> np.dtype:
    """Return the type of an array's numbers, from what a file gives for it."""
    if type(number) is not Number:
        raise pickle.UnpicklingError('it asks for an array of something else than plain numbers')
    return number.dtype


# What a file may call. numpy renamed its core in version 2, and a checkpoint names it as the numpy that wrote it did;
# protocol 2 names builtins as Python 2 did.
MAKERS: dict[str, Callable] = {
    **VALUES,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_of_bytes,
    'torch._utils._rebuild_parameter': _parameter,
    'collections.OrderedDict': _ordered_dict,
    'collections.Counter': _counter,
    'collections.defaultdict': _default_dict,
    'collections.deque': _deque,
    CONFIG_DICT: _config_dict,
    '_codecs.encode': _bytes,
    '__builtin__.bytes': _empty_bytes,
    'numpy.dtype': _number,
    **{f'numpy.{core}.multiarray._reconstruct': _empty_array for core in ('core', '_core')},
    **{f'numpy.{core}.numeric._frombuffer': _array_of_bytes for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')},
    **{f'{builtins}.getattr': _function for builtins in BUILTINS},
}
# classes whose objects a file makes first and fills later (with ConfigDict older mmengine does so); what it fills here
HOLDERS = {HISTORY: History, 'argparse.Namespace': Namespace, CONFIG_DICT: dict}
# what it may name without calling it
NAMES = {
    *HOLDERS,
    *DTYPES,
    *FACTORIES,
    ONE_CYCLE,
    'numpy.ndarray',
    *(f'{m}.{name}' for m in ('torch', 'torch.cuda', 'torch.storage') for name in STORAGES),
}
