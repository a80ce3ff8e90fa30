"""Checkpoints that attack whoever reads them, made by the tests that need them, and what they are made with.

``live`` files make the file ``marker`` when they are unpickled without care.
"""

from __future__ import annotations

import argparse
import io
import logging
import marshal
import operator
import os
import pickle
import pydoc
import subprocess
import tarfile
import timeit
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler


class Calls:
    """Pickles as a call of ``function(*args)``; what that returns is given ``state`` if there is one."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.call = (function, args, state)

    def __reduce__(self) -> tuple:
        return self.call

    def __call__(self) -> None:
        """Only a callable may be called in a pickle."""


def saved(payload: Any, **kwargs: Any) -> bytes:
    """Return a checkpoint like a training's, with a payload beside its tensors."""
    file = io.BytesIO()
    torch.save({'meta': {}, 'state_dict': {'w': torch.zeros(1)}, 'payload': payload}, file, **kwargs)
    return file.getvalue()


def archive(pickled: bytes, *storages: bytes) -> bytes:
    """Return an archive as torch.save writes it around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as out:
        for name, content in [('data.pkl', pickled), *((f'data/{i}', s) for i, s in enumerate(storages))]:
            out.writestr(f'archive/{name}', content)
        out.writestr('archive/version', b'3\n')
    return file.getvalue()


def pickle_of(path: Path) -> bytes:
    """Return the pickle in an archive of torch.save."""
    with zipfile.ZipFile(path) as file:
        return file.read(next(name for name in file.namelist() if name.endswith('/data.pkl')))


def opcodes(*parts: bytes | list) -> bytes:
    """Return a pickle of these opcodes; a list stands for those that push its items."""
    file = io.BytesIO()
    pickler = pickle._Pickler(file, 2)
    for part in parts:
        if isinstance(part, bytes):
            file.write(part)
        else:
            for item in part:
                pickler.save(item)
    return b'\x80\x02' + file.getvalue() + b'.'


def live(marker: Path) -> dict[str, bytes]:
    """Return files that make ``marker``, by the way they go."""
    path, command, python = str(marker), f'touch {marker}', f'open({str(marker)!r}, "w").close()'
    system, the_os = Calls(os.system, command), Calls(__import__, 'os')
    objects = np.array([system], dtype=object)
    second, npy = marker.with_name('second.pth'), marker.with_name('objects.npy')
    second.write_bytes(saved(system))
    np.save(npy, objects, allow_pickle=True)

    def through_globals(cls: type, name: str) -> Calls:
        found = Calls(getattr, Calls(getattr, cls, name), '__globals__')
        for key in ('__builtins__', 'eval'):
            found = Calls(Calls(getattr, found, '__getitem__'), key)
        return Calls(found, python)

    payloads = {
        'os.system': system,
        'subprocess.Popen': Calls(Calls(getattr, Calls(subprocess.Popen, ['touch', path]), 'wait')),
        'subprocess.check_call': Calls(subprocess.check_call, ['touch', path]),
        'builtins.eval': Calls(eval, python),
        'builtins.exec': Calls(exec, python),
        'builtins.open': Calls(open, path, 'w'),
        'timeit.timeit': Calls(timeit.timeit, python, 'pass', timeit.default_timer, 1),
        'pydoc.pipepager': Calls(pydoc.pipepager, '', command),
        'logging.FileHandler': Calls(logging.FileHandler, path),
        'pickle.loads': Calls(pickle.loads, pickle.dumps(system)),
        # by detours
        'getattr': Calls(Calls(getattr, the_os, 'system'), command),
        'methodcaller': Calls(operator.methodcaller('system', command), the_os),
        'attrgetter': Calls(Calls(operator.attrgetter('system'), the_os), command),
        'partial': Calls(partial(os.system, command)),
        'map': Calls(list, Calls(map, eval, [python])),
        'nested': {'a': [{'b': (system,)}]},
        'a key': {system: 1},
        'a namespace': argparse.Namespace(a=system),
        'the state of a HistoryBuffer': Calls(HistoryBuffer, state={'_log_history': system}),
        'globals of HistoryBuffer.__init__': through_globals(HistoryBuffer, '__init__'),
        'globals of HistoryBuffer.mean': through_globals(HistoryBuffer, 'mean'),
        'globals of a scheduler': through_globals(OneCycleParamScheduler, '_annealing_cos'),
        # through what is installed anyway
        'torch.load': Calls(partial(torch.load, weights_only=False), str(second)),
        'torch.storage': Calls(torch.storage._load_from_bytes, saved(system)),
        'a tensor subclass': Calls(torch._tensor._rebuild_from_type_v2, os.system, int, (command,), {}),
        'numpy.load': Calls(np.load, str(npy), None, True),
        'numpy.memmap': Calls(np.memmap, path, 'u1', 'w+', 0, (1,)),
        'a numpy array of objects': objects,
        'Config.fromstring': Calls(Config.fromstring, python, '.py'),
    }
    tar, pickled = io.BytesIO(), pickle.dumps(system, 2)
    with tarfile.open(fileobj=tar, mode='w') as out:
        for name in ('storages', 'tensors', 'pickle'):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            out.addfile(member, io.BytesIO(pickled))
    builtins = {'__builtins__': Calls(__import__, 'builtins')}  # Python 3.10 and later give them to any function
    function = [Calls(marshal.loads, marshal.dumps(compile(python, '', 'exec'))), builtins]
    return {
        **{name: saved(payload) for name, payload in payloads.items()},
        # in other words
        'compiled code': archive(opcodes(b'ctypes\nFunctionType\n', function, b'\x86R)R')),
        'protocol 0': archive(pickle.dumps(system, 0)),
        'protocol 4': archive(pickle.dumps(system, 4)),
        'protocol 5': archive(pickle.dumps(system, 5)),
        'opcode INST': archive(opcodes(b'(', [command], b'ios\nsystem\n')),
        'opcode OBJ': archive(opcodes(b'(cos\nsystem\n', [command], b'o')),
        'a bare pickle': pickled,
        'the format before torch 1.6': saved(system, _use_new_zipfile_serialization=False),
        'the tar of old': tar.getvalue(),
    }
