"""Small values of Python's and torch's that stand beside weights, made of checked numbers and texts."""

from __future__ import annotations

import datetime
import pickle
import struct
from collections.abc import Callable
from typing import Any

import torch

MAX_AXES = 16
MAX_PATH = 256  # characters
DEVICES = ('cpu', 'cuda', 'meta', 'mps', 'xpu')
DTYPE_NAMES = (
    'bool', 'uint8', 'int8', 'int16', 'int32', 'int64', 'float16', 'bfloat16', 'float32', 'float64', 'complex64',
    'complex128',
    # not in every supported version of torch
    'uint16', 'uint32', 'uint64', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz',
)  # fmt: skip
DTYPES = {f'torch.{name}': getattr(torch, name) for name in DTYPE_NAMES if hasattr(torch, name)}


def _size(lengths: Any) -> tuple:
    """Return a torch.Size as a tuple."""
    if type(lengths) is not tuple or len(lengths) > MAX_AXES or any(type(n) is not int for n in lengths):
        raise pickle.UnpicklingError('it asks for a size of an unknown kind')
    return lengths


def _device(kind: Any, index: Any = None) -> torch.device:
    """Return a device by name, which need not be there."""
    if type(kind) is not str or kind not in DEVICES or not (index is None or type(index) is int and 0 <= index < 128):
        raise pickle.UnpicklingError('it asks for a device of an unknown kind')
    return torch.device(kind) if index is None else torch.device(kind, index)


def _path(*parts: Any) -> str:
    """Return a path as a text."""
    if any(type(part) is not str for part in parts) or sum(map(len, parts)) > MAX_PATH:
        raise pickle.UnpicklingError('it asks for a path of an unknown kind')
    return ('/'.join(parts) or '.').replace('//', '/', 1)  # the first part of an absolute path is its root


def _datetime(data: Any, timezone: Any = None) -> datetime.datetime:
    """Return a time; the checks of ``datetime`` apply, which its own unpickling leaves out."""
    if type(data) is not bytes or len(data) != 10 or type(timezone) not in (datetime.timezone, type(None)):
        raise pickle.UnpicklingError('it asks for a time of an unknown kind')
    year, month, day, hour, minute, second = struct.unpack('>H5B', data[:7])
    fold, month = divmod(month, 128)
    return datetime.datetime(
        year, month, day, hour, minute, second, int.from_bytes(data[7:], 'big'), timezone, fold=fold
    )


def _timedelta(days: Any, seconds: Any, microseconds: Any) -> datetime.timedelta:
    if any(type(n) is not int for n in (days, seconds, microseconds)):
        raise pickle.UnpicklingError('it asks for a time of an unknown kind')
    return datetime.timedelta(days, seconds, microseconds)


def _timezone(offset: Any) -> datetime.timezone:
    if type(offset) is not datetime.timedelta:
        raise pickle.UnpicklingError('it asks for a time of an unknown kind')
    return datetime.timezone(offset)


VALUES: dict[str, Callable] = {
    'datetime.datetime': _datetime,
    'datetime.timedelta': _timedelta,
    'datetime.timezone': _timezone,
    'torch.Size': _size,
    'torch.device': _device,
    **{
        f'{module}.{name}': _path
        for module in ('pathlib', 'pathlib._local')  # the second in Python 3.13
        for name in ('PosixPath', 'PurePosixPath', 'WindowsPath', 'PureWindowsPath')
    },
}
