"""Checkpoints that attack whoever reads them, made by the tests that need them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler
from torch import nn


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
        'the globals of a function': Calls(found, code),
        'an array of objects': np.array([Calls(eval, code)], dtype=object),
    }


def forged() -> dict[str, Any]:
    """Return contents that would read memory; some crash whoever unpickles them without care."""
    empty = np.empty(0, 'b1').__reduce__()
    numbers = np.zeros(1).dtype.__reduce__()
    pointers = Calls(*numbers[:1], 'O', False, True, state=(3, '|', None, None, None, -1, -1, 63))
    fields = Calls(*numbers[:1], 'V8', False, True, state=(3, '|', None, ('a',), {'a': (np.dtype('O'), 0)}, 8, 8, 63))
    address = with_attributes(__array_interface__=dict(data=(1, False), shape=(1,), typestr='<f8', version=3))
    return {
        'objects from bytes': Calls(empty[0], *empty[1], state=(1, (1,), pointers, False, b'\x10' * 8)),
        'a dtype with fields': Calls(empty[0], *empty[1], state=(1, (1,), fields, False, b'\x10' * 8)),
        'a history at an address': Calls(
            HistoryBuffer, state=dict(max_length=1, _log_history=[address], _count_history=[address])
        ),
    }


def with_attributes(**attributes: Any) -> OrderedDict:
    """Return a dictionary with attributes: the one object that torch gives any attribute that a file names."""
    found = OrderedDict()
    found.__dict__.update(attributes)
    return found


def changes(admitted: list[Any]) -> Iterator[tuple[str, Any]]:
    """Iterate over contents that try to set ``hacked`` on classes and functions, each with a description.

    Every object that a file may name is called with every other and built from a state. It is also given to the two
    functions of torch that set attributes: on what a call returns, and on what the method of a holder returns.

    Args:
        admitted: The real objects of the names that the package admits.
    """
    formulas = {
        name: Calls(getattr, owner, name)
        for owner, name in (
            (HistoryBuffer, 'current'),
            (HistoryBuffer, 'mean'),
            (OneCycleParamScheduler, '_annealing_cos'),
        )
    }
    functions = {**{value.__name__: value for value in admitted}, **formulas}
    targets = dict(functions, Tensor=torch.Tensor, Parameter=nn.Parameter)
    state = dict(hacked=1, statistics_methods=dict(hacked=1), max_length=9)
    state.update(_log_history=np.ones(1), _count_history=np.ones(1))
    rebuild, parameter = torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_parameter_with_state
    for (name, function), (target_name, target) in product(functions.items(), targets.items()):
        text = f'{name} on {target_name}'
        named = [(target, attribute) for attribute in ('hacked', 'mean', '_annealing_cos')]
        for args in ((), (target,), (boxed(target),), *named, (target, target, target)):
            yield f'call of {text}', Calls(function, *args)
            yield f'state on {text}', Calls(function, *args, state=state)
            yield f'rebuild by {text}', Calls(rebuild, function, target, args, state)
        for other in functions.values():
            holder = with_attributes(as_subclass=other, detach=other)
            for new_type in (target, boxed(target)):
                yield f'as_subclass of {text}', Calls(rebuild, function, new_type, (boxed(holder),), state)
            yield f'parameter of {text}', Calls(parameter, boxed(holder), False, OrderedDict(), state)
    for name, target in targets.items():
        yield f'parameter {name}', Calls(parameter, target, False, OrderedDict(), state)


def boxed(value: Any) -> OrderedDict:
    """Return what looks like a history, whose latest entry is ``value``."""
    return with_attributes(_log_history=[value], _count_history=[value])
