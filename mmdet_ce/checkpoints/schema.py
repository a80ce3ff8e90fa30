"""What a checkpoint may hold: a bounded tree of plain values, and nothing that a framework would run or delete."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer
from torch import Tensor

from .unpickler import FUNCTION, Array, History

MAX_DEPTH = 64
MAX_VALUES = 1_000_000  # with what is shared counted each time, since who reads the tree meets it each time
# What mmengine and mmdet write, and this project's tools. mmengine parses `config`, of older times, as Python.
META = re.compile(
    r'epoch|iter|cfg|seed|experiment_name|time|dataset_meta|CLASSES|PALETTE|\w+_version|source|source_sha256|converter'
)
NONE = type(None)
TYPES = dict(
    epoch=(int,), iter=(int,), seed=(int, NONE), cfg=(str, NONE), time=(str, NONE), experiment_name=(str, NONE)
)


class Tree:
    """Checks a tree that ``DataUnpickler`` made, and builds mmengine's histories in it.

    Args:
        max_bytes: The bytes that its tensors may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes_left = max_bytes
        self.done: dict[int, tuple[Any, int]] = {}  # what was made of an object, and the values in it
        self.open: set[int] = set()

    def check(self, value: Any) -> Any:
        """Return the tree with ``HistoryBuffer`` objects in it; functions that a file names are left out.

        Raises:
            pickle.UnpicklingError: If a value is of another type than those below, or there are too many.
        """
        return self._check(value, 0)[0]

    def _check(self, value: Any, depth: int) -> tuple[Any, int]:
        if type(value) in (str, int, float, bool, bytes, type(None)):
            return value, 1
        if id(value) in self.done:
            return self.done[id(value)]
        if depth > MAX_DEPTH or id(value) in self.open:
            raise pickle.UnpicklingError(f'it nests containers deeper than {MAX_DEPTH}')
        self.open.add(id(value))
        made, count = self._made(value, depth + 1)
        self.open.remove(id(value))
        if count > MAX_VALUES:
            raise pickle.UnpicklingError(f'it holds more than {MAX_VALUES} values')
        self.done[id(value)] = made, count
        return made, count

    def _made(self, value: Any, depth: int) -> tuple[Any, int]:
        if type(value) is dict:
            items = {key: self._check(item, depth) for key, item in value.items() if item is not FUNCTION}
            return {key: item for key, (item, _) in items.items()}, 1 + sum(count for _, count in items.values())
        if type(value) in (list, tuple):
            checked = [self._check(item, depth) for item in value]
            return type(value)(item for item, _ in checked), 1 + sum(count for _, count in checked)
        if type(value) is Tensor:
            self.bytes_left -= value.numel() * value.element_size()
            if self.bytes_left < 0:
                raise pickle.UnpicklingError('its tensors take many times the bytes that it has')
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
            return HistoryBuffer(*(array.values for array in arrays), state['max_length']), 1
        raise pickle.UnpicklingError(f'it holds a {type(value).__name__}')


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
    state_dict = checkpoint.get('state_dict', {})
    _expect(isinstance(state_dict, dict), 'its state_dict is no dict')
    for key, tensor in state_dict.items():
        _expect(type(key) is str, f'its state_dict has a name of type {type(key).__name__}')
        is_tensor = type(tensor) is Tensor or key.endswith('_extra_state')
        _expect(is_tensor, f'its state_dict holds a {type(tensor).__name__} among the tensors')
    meta = {} if checkpoint.get('meta') is None else checkpoint['meta']
    _expect(type(meta) is dict, 'its meta is no dict')
    for key in meta.keys() & TYPES.keys():
        _expect(type(meta[key]) in TYPES[key], f'its meta.{key} is a {type(meta[key]).__name__}')
    removed = [key for key in meta if type(key) is not str or not META.fullmatch(key)]
    for key in removed:
        del meta[key]
    notes = [f'meta.{ascii(key)[1:41]}' for key in removed]
    if 'optimizer' in checkpoint:
        check_optimizer(checkpoint['optimizer'])
    schedulers = checkpoint.get('param_schedulers', [])
    _expect(type(schedulers) in (list, dict), 'its param_schedulers are neither a list nor a dict')
    if 'message_hub' in checkpoint:
        notes += _check_message_hub(checkpoint['message_hub'], path)
    return notes


def check_optimizer(optimizer: Any) -> None:
    """Check the outline of an optimizer's state, or of several by name."""
    _expect(type(optimizer) is dict, 'its optimizer is no dict')
    if 'param_groups' not in optimizer:
        for one in optimizer.values():
            _expect(type(one) is dict and 'param_groups' in one, 'its optimizer has no param_groups')
            check_optimizer(one)
        return
    groups = optimizer['param_groups']
    _expect(type(optimizer.get('state')) is dict, 'its optimizer has no state')
    _expect(type(groups) is list and all(type(group) is dict for group in groups), 'its param_groups are no dicts')


def _check_message_hub(hub: Any, path: Path) -> list[str]:
    """Remove paths of other folders than the file's: mmengine deletes the best checkpoint when a better one comes."""
    parts = ('log_scalars', 'runtime_info', 'resumed_keys')
    _expect(type(hub) is dict and all(type(hub.get(part)) is dict for part in parts), 'its message_hub is incomplete')
    info, notes = hub['runtime_info'], []
    for key in [key for key in info if str(key).startswith(('best_ckpt', 'last_ckpt'))]:
        value = info[key]
        own = type(value) is str and Path(value).suffix == '.pth' and Path(value).absolute().parent == path.parent
        if not own and value is not None:
            del info[key]
            notes.append(f'message_hub.runtime_info.{ascii(key)[1:41]}, a path outside its folder')
    ids = info.get('keep_ckpt_ids', [])
    _expect(type(ids) is list and all(type(i) is int for i in ids), 'its keep_ckpt_ids are no numbers')
    return notes


def _expect(fact: bool, otherwise: str) -> None:
    if not fact:
        raise pickle.UnpicklingError(otherwise)
