"""Checkpoints that run nothing, but forge objects, claim memory without bounds, or are none."""

from __future__ import annotations

import codecs
import copy
import io
import os
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from hostile import Calls, archive, opcodes, saved
from mmengine.logging import HistoryBuffer

from mmdet_ce.compat import TORCH

_reconstruct = np.zeros(0).__reduce__()[0]  # its module has another name since numpy 2
scalar = np.float64(0).__reduce__()[0]

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


def forged_values() -> dict[str, bytes]:
    """Return files with containers and small values that are no plain data, or are forged."""
    return {
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
        'large expanded': torch.zeros(1).expand(10**6),
    }
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
        **forged_values(),
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
