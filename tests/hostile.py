"""Checkpoints that attack whoever reads them, made by the tests that need them.

``live`` files make the file ``marker`` when they are unpickled without care. ``forged`` ones run nothing, but ask for
memory without bounds, for objects out of bytes, or are none of what they pretend to be.
"""

from __future__ import annotations

import argparse
import codecs
import copy
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
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime, timezone
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from mmdet_ce.compat import TORCH

try:
    from numpy._core.multiarray import _reconstruct, scalar
except ImportError:  # numpy 1
    from numpy.core.multiarray import _reconstruct, scalar


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


# parts of a training's checkpoint, as none is written
WRONG_PARTS = {
    'state_dict': [torch.zeros(1)],
    'state_dict ': {1: torch.zeros(1)},
    'state_dict  ': {'a': {'b': torch.zeros(1)}},
    'meta': ['epoch'],
    'meta ': {'epoch': 'one'},
    'meta  ': {'seed': [1]},
    'optimizer': [1],
    'optimizer ': {'state': {}, 'param_groups': 'none'},
    'optimizer  ': {'state': {}},
    'param_schedulers': 3,
    'message_hub': {'log_scalars': []},
    'message_hub ': {'log_scalars': {}, 'resumed_keys': {}, 'runtime_info': {'keep_ckpt_ids': ['../../a']}},
    'ema_state_dict': {'a': 'text'},
    'optimizer   ': {'state': {0: []}, 'param_groups': []},
    'optimizer     ': {'state': {}, 'param_groups': [{'params': [0], 'lr': 'fast'}]},
    'param_schedulers    ': [{'last_step': 'last'}],
    'optimizer    ': {'state': {}, 'param_groups': [{'lr': 1.0}]},
    'state_dict   ': {'a\x1b[2J': torch.zeros(1)},
    'state_dict    ': {'a' * 50_000: torch.zeros(1)},
    'meta   ': {'seed': -1},
    'meta    ': {'seed': 1 << 40},
    'meta     ': {'iter': 1 << 70},
    'param_schedulers ': [{'step': 1}],
    'param_schedulers  ': [{'optimizer': {}}],
    'param_schedulers   ': {'generator': [{'_get_value': None}]},
}


def part(key: str, value: Any) -> bytes:
    """Return a training's checkpoint with one part exchanged."""
    file = io.BytesIO()
    whole = {'meta': {'epoch': 1, 'iter': 1}, 'state_dict': {}, 'optimizer': {'state': {}, 'param_groups': []}}
    torch.save({**whole, key.strip(): value}, file)
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


def costly() -> dict[str, bytes]:
    """Return small files that cost whoever does what they say, step by step, much time or memory."""

    def array() -> Calls:
        return Calls(_reconstruct, np.ndarray, (0,), b'b', state=(1, (len(data),), np.dtype('u1'), False, data))

    def history() -> HistoryBuffer:
        made = HistoryBuffer()
        made._log_history = made._count_history = numbers
        return made

    def storage(index: int) -> bytes:
        return b'(X\x07\0\0\0storagectorch\nFloatStorage\nX\x05\0\0\0%05dX\x03\0\0\0cpuK\0NtQ' % index

    data, text, numbers = bytes(1 << 20), 'a' * (1 << 20), np.zeros(1 << 17)
    pairs, sizes = [(i, i) for i in range(10_000)], (1,) * 10_000
    counts, members = dict(pairs), [*range(10_000)]
    rebuild = torch._utils._rebuild_tensor_v2, torch.zeros(1).storage(), 0, sizes, sizes, False, OrderedDict()
    directory = io.BytesIO()
    with zipfile.ZipFile(directory, 'w') as out:
        out.writestr('archive/data.pkl', opcodes([{}]))
        for index in range(100_000):
            out.writestr(zipfile.ZipInfo(f'archive/data/{index}'), b'')
    long_call = b'cnumpy\ndtype\nq\x00(' + opcodes(['f8'])[2:-1] + b'N' * 100_000 + b'tq\x01'
    deep: list = [[]]
    for _ in range(100):  # each holds the one before, which was seen where it is not deep
        deep.append([deep[-1]])
    wide = ('a' * (30 << 20) + '\U0001f600').encode()
    sizes_that_lie = io.BytesIO(archive(opcodes([{}]), bytes(1 << 20)))
    with zipfile.ZipFile(sizes_that_lie, 'a') as out:
        out.getinfo('archive/data.pkl').compress_size = 1 << 20
        out.comment = b'changed'  # so that the list is written again
    head = b''.join(opcodes([part]) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    storages = b''.join(map(storage, range(60_000)))
    return {
        'one text encoded many times': saved([Calls(codecs.encode, text, 'latin1') for _ in range(10_000)]),
        'one list made a dict many times': saved([Calls(OrderedDict, pairs) for _ in range(10_000)]),
        'one dict counted many times': saved([Calls(Counter, counts) for _ in range(10_000)]),
        'one size of many axes': saved([Calls(*rebuild) for _ in range(10_000)]),
        'one array copied many times': saved([array() for _ in range(10_000)]),
        'many histories of one array': saved([history() for _ in range(10_000)]),
        'one call with many arguments': archive(b'\x80\x02](' + long_call + b'h\x00h\x01R' * 20_000 + b'e.'),
        'many namespaces of one dict': archive(
            opcodes(b'](', [counts], b'q\x7f' + b'cargparse\nNamespace\n)\x81h\x7fb' * 10_000 + b'e')
        ),
        'levels found one by one': saved(deep),
        'characters of four bytes': archive(b'\x80\x02X' + len(wide).to_bytes(4, 'little') + wide + b'.'),
        'keys that equal nothing': saved({float('nan'): 0 for _ in range(100)}),  # one hash, before Python 3.10
        'many keys of tuples': saved({(i, 0): 0 for i in range(2000)}),  # whose hashes an attacker can make the same
        'one list made a set many times': saved([Calls(set, members) for _ in range(100)]),
        'one size many times': saved([Calls(torch.Size, sizes) for _ in range(10_000)]),
        'keys of one hash': saved({i * (2**61 - 1): 0 for i in range(100)}),
        'an entry longer than it is': sizes_that_lie.getvalue(),
        'many sets': archive(opcodes(b'](' + b'\x8f' * 300_000 + b'e')),
        'many dicts': archive(b'\x80\x02](' + b'}' * 900_000 + b'e.'),
        'a large directory': directory.getvalue(),
        'many storages before torch 1.6': head + b'\x80\x02](' + storages + b'e.' + opcodes([[]]),
    }


def forged() -> dict[str, bytes]:
    """Return files that forge objects or claim memory, or are no checkpoints."""

    def array(length: int, data: bytes) -> Calls:
        return Calls(_reconstruct, np.ndarray, (0,), b'b', state=(1, (length,), np.dtype('f8'), False, data))

    def tensor(storage_size: int, size: tuple, stride: tuple = (1,)) -> bytes:
        storage = [('storage', torch.FloatStorage, '0', 'cpu', storage_size)]
        rest = [0, size, stride, False, OrderedDict()]
        return opcodes([torch._utils._rebuild_tensor_v2], b'(', storage, b'Q', rest, b'tR')

    shared: Any = ()
    for _ in range(40):  # 2 to the 40th values for a reader that visits each of them
        shared = (shared, shared)
    rebuild, identity = torch._tensor._rebuild_from_type_v2, Calls(getattr, HistoryBuffer, 'current')
    changed = OrderedDict()
    changed.as_subclass = identity
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    meta, sparse = torch.zeros(4, device='meta'), torch.zeros(4).to_sparse()
    tensors = {
        'meta': meta,
        'sparse': sparse,
        'quantized': quantized,
        'conjugate': torch.zeros(2, dtype=torch.complex64).conj(),
    }
    tensors['large expanded'] = torch.zeros(1).expand(10**6)
    expanded = torch.zeros(1).expand(1 << 20)
    rebuild_tensor = torch._utils._rebuild_tensor_v2
    rebuild_bytes = getattr(torch._utils, '_rebuild_tensor_v3', rebuild_tensor)  # since torch 2.1
    as_bytes = torch.zeros(4, dtype=torch.uint8).untyped_storage(), 0, (1,), (1,), False, OrderedDict()
    if TORCH >= (2, 3):  # an older torch cannot save it
        tensors['nested'] = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    many_views = torch.zeros(1 << 18)
    script, compressed, overlapping, other = (io.BytesIO() for _ in range(4))
    torch.jit.save(torch.jit.script(torch.nn.Identity()), script)
    with zipfile.ZipFile(compressed, 'w', zipfile.ZIP_DEFLATED) as out:
        out.writestr('archive/data.pkl', tensor(50 << 20, (50 << 20,)))
        out.writestr('archive/data/0', bytes(200 << 20))
        out.writestr('archive/version', b'3\n')
    overlapping.write(archive(opcodes([{}]), bytes(1 << 16)))
    with zipfile.ZipFile(overlapping, 'a') as out:
        for index in range(1, 1000):
            again = copy.copy(out.getinfo('archive/data/0'))
            again.filename = f'archive/data/{index}'
            out.filelist.append(again)
        out.comment = b'changed'  # so that the list is written again
    with zipfile.ZipFile(other, 'w') as out:
        out.writestr('word/document.xml', '<xml/>')
    return {
        'a function that no checkpoint needs': saved(Calls(getattr, HistoryBuffer, '__init__')),
        'numpy: a dtype of objects': saved(Calls(np.dtype, 'O', False, True)),
        'numpy: objects out of bytes': saved(Calls(scalar, Calls(np.dtype, [('a', 'O')]), np.zeros(1))),
        'numpy: numbers of another byte order': saved(np.arange(3).astype('>f8')),
        'numpy: a large array': saved(Calls(_reconstruct, np.ndarray, (10**13,), 'd')),
        'numpy: a large array, made directly': saved(Calls(np.ndarray, (10**13,), 'd')),
        'numpy: more numbers than bytes': saved(array(1000, bytes(8))),
        'numpy: an array filled twice': archive(
            opcodes([array(1000, bytes(8000)), (1, (1,), np.dtype('f8'), False, bytes(8))], b'b')
        ),
        'torch: a tensor beyond its storage': archive(tensor(4, (10**12,)), bytes(16)),
        'torch: a storage beyond the file': archive(tensor(10**12, (4,)), bytes(16)),
        'torch: more numbers than a tensor counts': archive(tensor(4, (1 << 32, 1 << 32), (0, 0)), bytes(16)),
        'torch: a tensor as a storage': saved(Calls(rebuild_tensor, expanded, 10**6, (4,), (1,), False, OrderedDict())),
        'torch: a tensor of another type': saved(Calls(rebuild_bytes, *as_bytes, Calls(str), None)),
        'torch: a tensor of half numbers': saved(Calls(rebuild_bytes, *as_bytes, torch.float64, None)),
        'a persistent id of text': archive(opcodes(['os'], b'Q')),
        'a persistent id of a module': archive(opcodes([('module', 'os', 'os.py', 'system')], b'Q')),
        'a name by one that is admitted': archive(b'\x80\x04\x8c\x05torch\x8c\x11storage.os.getpid\x93)R.'),
        'bytes beyond the file': opcodes(b'\x96' + (1 << 40).to_bytes(8, 'little')),
        'an extension code': archive(opcodes(b'\x82\x01')),
        # a function of mmengine's called by torch's own rebuilding, to set attributes of a class
        'a class as a tensor': saved(Calls(rebuild, identity, type, (torch.Tensor,), {'isnan': OrderedDict})),
        'an identity called': saved(Calls(identity, torch.Tensor)),
        'attributes of a dict': saved(Calls(rebuild, OrderedDict, torch.Tensor, (changed,), {'isnan': OrderedDict})),
        'a tensor of attributes': saved(Calls(rebuild, torch._utils._rebuild_parameter, int, (1, 2, 3), {'grad': 1})),
        # what takes too long to print or to copy
        'shared tuples': saved(shared),
        'shared tuples: getattr': saved(Calls(getattr, shared, 'mean')),
        'shared tuples: an array': saved(Calls(_reconstruct, np.ndarray, shared, b'b')),
        'shared tuples: a dtype': saved(Calls(np.dtype, shared)),
        'shared tuples: a persistent id': archive(opcodes([('storage', shared, '0', 'cpu', 1)], b'Q')),
        'shared tuples: a name': archive(opcodes([{}, shared, 1], b's')),
        'shared tuples: a history': archive(
            opcodes(
                [HistoryBuffer], b')\x81', [{'_log_history': shared, '_count_history': shared, 'max_length': 1}], b'b'
            )
        ),
        'a namespace that is filled twice': archive(
            opcodes(b'cargparse\nNamespace\n)\x81', [{'a': 1}], b'b', [{'b': 1}], b'b')
        ),
        'a namespace of no attributes': archive(opcodes(b'cargparse\nNamespace\n)\x81', [[1]], b'b')),
        'a namespace that holds itself': archive(opcodes(b'cargparse\nNamespace\n)\x81q\x7f}X\1\0\0\0ah\x7fsb')),
        'shared lists': saved([[shared] * 1000] * 1000),
        'nested lists': archive(b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.'),
        'a list that holds itself': archive(opcodes(b']q\x00h\x00a')),
        'more steps than a checkpoint takes': archive(b'\x80\x02]' + b'}a' * 3_000_000 + b'.'),
        'many tensors on one storage': saved({i: many_views[i:] for i in range(1000)}),
        **{f'a {name} tensor': saved(tensor) for name, tensor in tensors.items()},
        # other containers and attributes
        'a counter of text': saved(Counter('aab')),
        'a counter that is filled twice': archive(opcodes([Counter([1]), 1, 2], b's')),
        'a counter with attributes': archive(opcodes([Counter([1]), {'update': 1}], b'b')),
        'a class': saved(HistoryBuffer),
        'bytes made elsewhere': saved(Calls(codecs.encode, 'a', 'rot13')),
        'a byte array': saved(bytearray(4)),
        'a key of another type': saved({torch.float32: 1}),
        'a key of many values': saved({(1,) * 9: 1}),
        'a key of a key': saved({((1,),): 1}),
        'a set of dtypes': saved({torch.float32}),
        'a set of something else than a list': saved(Calls(set, (1, 2))),
        'a set with attributes': archive(opcodes([{1}, {'a': 1}], b'b')),
        'a set that holds itself': archive(opcodes(b'\x8fq\x7f(h\x7f\x90')),
        'members of a list': archive(opcodes(b'](K\x01\x90')),
        'a builtin': saved(int),
        'a builtin called': saved(Calls(str, 'a')),
        'a size of text': saved(Calls(torch.Size, ('a',))),
        'a device by another name': saved(Calls(torch.device, 'privateuseone')),
        'a device of no index': saved(Calls(torch.device, 'cuda', 10**6)),
        'a defaultdict of a function': saved(defaultdict(os.getpid)),
        'a deque of a list': saved(Calls(deque, [1])),
        'a path of numbers': saved(Calls(PurePosixPath, 1)),
        'a long path': saved(PurePosixPath('a' * 10_000)),
        'a time without a month': saved(Calls(datetime, bytes(10))),
        'a time of text': saved(Calls(datetime, '2024-01-01')),
        'a time zone of text': saved(Calls(timezone, 'UTC')),
        # parts of a training of another type
        **{f'{key} of a wrong type': part(key, value) for key, value in WRONG_PARTS.items()},
        'TorchScript': script.getvalue(),
        'a compressed bomb': compressed.getvalue(),
        'an overlapping bomb': overlapping.getvalue(),
        'an archive of something else': other.getvalue(),
        'half a checkpoint': saved(None)[:500],
        'an empty pickle': archive(b''),
        'a pickle that only starts': b'\x80\x02',
        'noise': bytes(range(256)) * 8,
    }
