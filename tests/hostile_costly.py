"""Small checkpoints that cost their reader much time or memory."""

from __future__ import annotations

import codecs
import io
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import torch
from hostile import Calls, archive, opcodes, saved
from mmengine.logging import HistoryBuffer

_reconstruct = np.zeros(0).__reduce__()[0]  # its module has another name since numpy 2


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
    nested = b''.join(b'q%ch%c\x86' % (i, i) for i in range(60))  # a tuple that holds the one before twice
    one_storage = b'(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0' + b'0X\3\0\0\0cpuK\1tQ'
    one_tensor = b'ctorch._utils\n_rebuild_tensor_v2\nq\0(' + one_storage + b'K\0(K\1t(K\1t\x89}tq\1'
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
        'keys of storages that take long to hash': (
            head + b'\x80\x02](' + storage(0) + b'e.\x80\x02]K\1' + nested + b'a.'
        ),
        'an array whose shape is a large tensor': saved(
            Calls(_reconstruct, np.ndarray, (torch.zeros(1).expand(1 << 38),), b'b')
        ),
        'one tensor many times': archive(b'\x80\x02](' + one_tensor + b'h\0h\1R' * 150_000 + b'e.', bytes(4)),
        'many storages before torch 1.6': head + b'\x80\x02](' + storages + b'e.' + opcodes([[]]),
    }
