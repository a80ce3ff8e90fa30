"""What a checkpoint may hold: a bounded tree of plain values, and nothing that a framework would run or delete."""

from __future__ import annotations

import datetime
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from torch import Tensor

from .makers import FUNCTION, Array, History, Namespace, Token
from .values import DTYPES

MAX_DEPTH = 64
MAX_VALUES = 1_000_000  # a shared value counts every time it occurs, since a reader of the tree visits it every time
# What mmengine and mmdet write, and this project's tools. mmengine parses `config`, of older times, as Python.
META = re.compile(
    r'epoch|iter|cfg|seed|experiment_name|time|dataset_meta|CLASSES|PALETTE|\w+_version|source|source_sha256|converter'
)
NONE = type(None)
LIMITS = dict(seed=1 << 32)  # numpy takes no larger one
TYPES = dict(
    epoch=(int,), iter=(int,), seed=(int, NONE), cfg=(str, NONE), time=(str, NONE), experiment_name=(str, NONE)
)


class Tree:
    """Checks a tree that ``DataUnpickler`` made, and builds mmengine's histories in it.

    Args:
        max_bytes: The bytes that its tensors may take together.
        max_values: How many values it may hold.
    """

    def __init__(self, max_bytes: int, max_values: int = MAX_VALUES) -> None:
        self.bytes_left, self.max_values = max_bytes, max_values
        self.done: dict[int, tuple[Any, int, int]] = {}  # what was made of an object, the values and the levels in it

    def check(self, value: Any) -> Any:
        """Return the tree with ``HistoryBuffer`` objects in it, a dict for a namespace, and dtypes for their names.

        Functions that a file names are left out.

        Raises:
            pickle.UnpicklingError: If a value is of another type than those below, or there are too many.
        """
        return self._check(value, 0)[0]

    def _check(self, value: Any, depth: int) -> tuple[Any, int, int]:
        if type(value) in (str, int, float, bool, bytes, type(None)):
            return value, 1, 0
        if depth > MAX_DEPTH:  # in a container that holds itself, too
            raise pickle.UnpicklingError(f'it nests containers deeper than {MAX_DEPTH}')
        if id(value) not in self.done:
            self.done[id(value)] = self._made(value, depth + 1)
        made, count, levels = self.done[id(value)]
        if count > self.max_values or depth + levels > MAX_DEPTH:
            raise pickle.UnpicklingError(f'it holds more than {self.max_values} values, or {MAX_DEPTH} levels')
        return made, count, levels

    def _made(self, value: Any, depth: int) -> tuple[Any, int, int]:
        if type(value) in (dict, list, tuple):
            items = value.values() if type(value) is dict else value
            checked = [self._check(item, depth) for item in items if item is not FUNCTION or type(value) is not dict]
            made = [item for item, _, _ in checked]
            if type(value) is dict:
                made = zip([key for key, item in value.items() if item is not FUNCTION], made)
            levels = 1 + max((levels for _, _, levels in checked), default=0)
            return type(value)(made), 1 + sum(count for _, count, _ in checked), levels
        if type(value) is Namespace:
            return ({}, 1, 0) if value.state is None else self._check(value.state, depth)
        return (*self._made_leaf(value), 0)

    def _made_leaf(self, value: Any) -> tuple[Any, int]:
        if type(value) in (Counter, set, frozenset):  # of integers; of what can be a key
            return value, 1 + len(value)
        if type(value) in (torch.device, datetime.datetime, datetime.timedelta, datetime.timezone):
            return value, 1
        if type(value) is Token:
            _expect(value.name in DTYPES, f'it holds {value.name}')
            return DTYPES[value.name], 1
        if type(value) is Tensor:
            self._charge(value.numel() * value.element_size())
            return value, 1
        if type(value) is Array and value.values is not None:
            return value.values, 1
        if type(value) is History:
            state = value.state or {}
            arrays = [state.get(f'_{name}_history') for name in ('log', 'count')]
            if any(type(array) is not Array or np.ndim(array.values) != 1 for array in arrays):
                raise pickle.UnpicklingError('it holds a HistoryBuffer without its histories')
            if type(state.get('max_length')) is not int:
                raise pickle.UnpicklingError('it holds a HistoryBuffer without its length')
            self._charge(sum(array.values.nbytes for array in arrays))
            return HistoryBuffer(*(array.values for array in arrays), state['max_length']), 1
        raise pickle.UnpicklingError(f'it holds a {type(value).__name__}')

    def _charge(self, length: int) -> None:
        """Count bytes, since several tensors may look at one storage, and who copies them needs memory for each."""
        self.bytes_left -= length
        if self.bytes_left < 0:
            raise pickle.UnpicklingError('its tensors take many times the bytes that it has')


def check_training(checkpoint: dict, path: Path) -> list[str]:
    """Check the parts that MMDetection reads of a checkpoint, and remove what it would run, open or delete.

    Args:
        checkpoint: What the file holds; changed in place.
        path: The file.

    Returns:
        What was removed, a line for each.

    Raises:
        pickle.UnpicklingError: If a part is of another type than a training writes.
    """
    _expect(all(type(key) is str for key in checkpoint), 'it has names of another type than text')
    for part in ('state_dict', 'ema_state_dict'):
        _check_state_dict(checkpoint.get(part, {}), part)
    meta = {} if checkpoint.get('meta') is None else checkpoint['meta']
    _expect(type(meta) is dict, 'its meta is no dict')
    for key in meta.keys() & TYPES.keys():
        _expect(type(meta[key]) in TYPES[key], f'its meta.{key} is a {type(meta[key]).__name__}')
        _expect(
            type(meta[key]) is not int or 0 <= meta[key] < LIMITS.get(key, 1 << 40), f'its meta.{key} is out of range'
        )
    removed = [key for key in meta if type(key) is not str or not META.fullmatch(key)]
    for key in removed:
        del meta[key]
    notes = [f'meta.{ascii(key)[1:41]}' for key in removed]
    if 'optimizer' in checkpoint:
        _check_optimizer(checkpoint['optimizer'])
    _check_schedulers(checkpoint.get('param_schedulers', []))
    if 'message_hub' in checkpoint:
        notes += _check_message_hub(checkpoint['message_hub'], path)
    return notes


def _check_state_dict(state_dict: Any, part: str) -> None:
    _expect(type(state_dict) is dict, f'its {part} is no dict')
    for key, tensor in state_dict.items():
        _expect(type(key) is str, f'its {part} has a name of type {type(key).__name__}')
        _expect(len(key) < 1000 and key.isprintable(), f'its {part} has a name that cannot be printed')
        is_tensor = type(tensor) is Tensor or key.endswith('_extra_state')
        _expect(is_tensor, f'its {part} holds a {type(tensor).__name__} among the tensors')


def _check_optimizer(optimizer: Any) -> None:
    """Check the outline of an optimizer's state, or of several by name."""
    _expect(type(optimizer) is dict, 'its optimizer is no dict')
    if 'param_groups' not in optimizer:
        for one in optimizer.values():
            _expect(type(one) is dict and 'param_groups' in one, 'its optimizer has no param_groups')
            _check_optimizer(one)
        return
    groups, state = optimizer['param_groups'], optimizer.get('state')
    _expect(type(state) is dict and all(type(one) is dict for one in state.values()), 'its optimizer has no state')
    known = type(groups) is list and all(type(group) is dict and type(group.get('params')) is list for group in groups)
    _expect(known, 'its optimizer has no param_groups with params')
    numbers = [group.get(key, 0) for group in groups for key in ('lr', 'initial_lr', 'momentum', 'weight_decay')]
    _expect(all(type(one) in (int, float, Tensor) for one in numbers), 'its optimizer has settings that are no numbers')


def _check_schedulers(schedulers: Any) -> None:
    """Check the state of schedulers, which mmengine makes their attributes as it is."""
    if type(schedulers) is dict:  # of several optimizers, by name
        schedulers = [one for several in schedulers.values() for one in (several if type(several) is list else [None])]
    _expect(type(schedulers) is list, 'its param_schedulers are neither a list nor a dict')
    for one in schedulers:
        _expect(type(one) is dict, 'its param_schedulers hold something else than states')
        replaced = [key for key in one if hasattr(_ParamScheduler, str(key))]
        _expect(
            all(type(one.get(key, 0)) is int for key in ('last_step', '_global_step')), 'its schedulers have no step'
        )
        _expect(not replaced and 'optimizer' not in one, 'its param_schedulers replace functions of the scheduler')


def _check_message_hub(hub: Any, path: Path) -> list[str]:
    """Remove paths of other folders than the file's: mmengine deletes the best checkpoint when a better one comes."""
    parts = ('log_scalars', 'runtime_info', 'resumed_keys')
    _expect(type(hub) is dict and all(type(hub.get(part)) is dict for part in parts), 'its message_hub is incomplete')
    info, notes = hub['runtime_info'], []
    for key in [key for key in info if str(key).startswith(('best_ckpt', 'last_ckpt'))]:
        value, prefix = info[key], 'best_' if str(key).startswith('best_ckpt') else ''
        own = type(value) is str and Path(value).absolute().parent == path.parent
        own = own and Path(value).name.startswith(prefix) and Path(value).suffix == '.pth'
        if not own and value is not None:
            del info[key]
            notes.append(f'message_hub.runtime_info.{ascii(key)[1:41]}, a path outside its folder')
    for key in ('keep_ckpt_ids', 'outdated_ckpt_ids'):
        ids = info.get(key, [])
        _expect(type(ids) is list and all(type(i) is int for i in ids), f'its {key} are no numbers')
    return notes


def _expect(fact: bool, otherwise: str) -> None:
    if not fact:
        raise pickle.UnpicklingError(otherwise)
