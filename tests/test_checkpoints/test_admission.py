"""mmengine's checkpoints are read as data; anything else is refused and never runs."""

from __future__ import annotations

import argparse
import contextlib
import io
import pickletools
import time
from collections import Counter, defaultdict, deque
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath

import hostile
import numpy as np
import pytest
import torch
from hostile import Calls
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR
from mmengine.runner import CheckpointLoader

from mmdet_ce.checkpoints import CheckpointFileError, load_from_local, read_checkpoint
from mmdet_ce.checkpoints.makers import MAKERS, NAMES, STORAGES
from mmdet_ce.checkpoints.unpickler import HANDLERS
from mmdet_ce.checkpoints.values import DTYPES
from mmdet_ce.compat import TORCH


def test_history_buffer_round_trip(tmp_path):
    buffer = HistoryBuffer()
    for value in (1.0, 2.0, 4.0):
        buffer.update(value)
    torch.save({'loss': buffer, 'iter': np.int64(3), 'lr': np.float64(0.5)}, tmp_path / 'a.pth')
    loaded = read_checkpoint(tmp_path / 'a.pth')
    assert type(loaded['loss']) is HistoryBuffer and loaded['loss'].mean() == pytest.approx(7 / 3)
    assert loaded['loss'].statistics('max') == 4
    assert loaded['iter'] == 3 and loaded['lr'] == 0.5


@pytest.mark.parametrize('strategy', ['cos', 'linear'])
def test_one_cycle_schedule_round_trip(strategy, tmp_path):
    """The function that anneals stays the one that the config asked for."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = OneCycleLR(optimizer, eta_max=1.0, total_steps=10, anneal_strategy=strategy)
    anneal = scheduler.anneal_func
    torch.save(scheduler.state_dict(), tmp_path / 'a.pth')
    scheduler.load_state_dict(read_checkpoint(tmp_path / 'a.pth'))
    assert scheduler.anneal_func is anneal
    optimizer.step(), scheduler.step()


@pytest.mark.parametrize(
    'array',
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array(3.0, dtype='f4'),
        np.arange(10, dtype='i4')[::2] > 3,
    ],
)
def test_array_round_trip(array, tmp_path):
    torch.save({'array': array}, tmp_path / 'a.pth')
    loaded = read_checkpoint(tmp_path / 'a.pth')['array']
    assert type(loaded) is np.ndarray and loaded.dtype == array.dtype and np.array_equal(loaded, array)


@pytest.mark.parametrize('code', ['f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1'])
def test_numbers_of_every_size_round_trip(code, tmp_path):
    """A metric may be a float16, and numpy's random state is an array of uint32."""
    array = np.array([0, 1]).astype(code)
    torch.save({'array': array, 'scalar': array[1]}, tmp_path / 'a.pth')
    loaded = read_checkpoint(tmp_path / 'a.pth')
    assert loaded['array'].dtype == array.dtype and np.array_equal(loaded['array'], array)
    assert loaded['scalar'] == array[1].item()


def savable_dtypes() -> list[torch.dtype]:
    """Return the types of tensors that this torch can save."""
    savable = []
    for dtype in DTYPES.values():
        with contextlib.suppress(KeyError):  # torch 2.1 cannot save float8
            torch.save(torch.zeros(1).to(dtype), io.BytesIO())
            savable.append(dtype)
    assert savable[:12] == [*DTYPES.values()][:12]
    return savable


@pytest.mark.parametrize('new', [True, False], ids=['archive', 'before torch 1.6'])
def test_tensors_round_trip(new, tmp_path):
    """Of every admitted type, views and parameters among them, as torch.load reads them."""
    base = torch.randn(6, 4)
    content = {str(dtype): (10 * base).to(dtype) for dtype in (savable_dtypes() if new else {*STORAGES.values()})}
    content.update(
        view=base.t()[1:3],
        scalar=torch.tensor(3.0),
        empty=torch.zeros(0, 3),
        expanded=torch.ones(1).expand(5),
        w=torch.nn.Parameter(base),
    )
    content['state_dict'] = torch.nn.BatchNorm2d(3).state_dict()
    path = tmp_path / 'a.pth'
    torch.save(content, path, _use_new_zipfile_serialization=new)
    ours, theirs = read_checkpoint(path), torch.load(path)
    assert [*ours] == [*theirs] and type(ours['state_dict']) is dict
    for name, tensor in {**theirs, **theirs['state_dict']}.items():
        if isinstance(tensor, torch.Tensor):
            own = {**ours, **ours['state_dict']}[name]
            assert own.dtype == tensor.dtype and not own.requires_grad and own.shape == tensor.shape, name
            assert own.tolist() == tensor.tolist(), name  # torch.equal does not know the types of 8 bits


@pytest.mark.parametrize('protocol', [2, 4])
def test_options_beside_weights_are_a_dict(protocol, tmp_path):
    """DETR's, DeiT's and MAE's public weights hold the ``argparse.Namespace`` of their training."""
    args = argparse.Namespace(lr=0.1, inner=argparse.Namespace(name='a'), empty=argparse.Namespace(), w=torch.ones(2))
    torch.save({'model': {'w': torch.ones(2)}, 'args': args}, tmp_path / 'a.pth', pickle_protocol=protocol)
    loaded = load_from_local(str(tmp_path / 'a.pth'))
    assert loaded['model']['w'].sum() == loaded['args'].pop('w').sum() == 2
    assert loaded['args'] == {'lr': 0.1, 'inner': {'name': 'a'}, 'empty': {}}


PLAIN = {  # name: what is saved, what it is loaded as
    'set': ({1, 'a', None}, {1, 'a', None}),
    'empty set': (set(), set()),
    'frozenset': (frozenset([1, (2, 'b')]), frozenset([1, (2, 'b')])),
    'keys of tuples': ({(1, 'a'): 2}, {(1, 'a'): 2}),
    'size': (torch.zeros(2, 3).shape, (2, 3)),
    'dtype': (torch.float32, torch.float32),
    'device': (torch.device('cuda', 1), torch.device('cuda', 1)),
    'device without an index': (torch.device('cpu'), torch.device('cpu')),
    'defaultdict': (defaultdict(list, a=[1]), {'a': [1]}),
    'defaultdict without a factory': (defaultdict(None, a=1), {'a': 1}),
    'deque': (deque([1, 2]), [1, 2]),
    'deque with a length': (deque([1, 2], 3), [1, 2]),
    'path': (Path('/data', 'coco', 'a.jpg'), '/data/coco/a.jpg'),
    'path without folders': (Path('a'), 'a'),
    'empty path': (Path(), '.'),
    'windows path': (PureWindowsPath('a', 'b'), 'a/b'),
    'time': (datetime(2024, 2, 29, 13, 5, 1, 70000), datetime(2024, 2, 29, 13, 5, 1, 70000)),
    'time in a zone': (datetime(2024, 2, 29, fold=1, tzinfo=timezone.utc),) * 2,
    'duration': (timedelta(3, 4, 5), timedelta(3, 4, 5)),
    'config': (ConfigDict(a=1, b=dict(c=2)), {'a': 1, 'b': {'c': 2}}),
}


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('name', PLAIN)
def test_plain_values_beside_weights(name, protocol, tmp_path):
    value, expected = PLAIN[name]
    torch.save({'state_dict': {}, 'a': value}, tmp_path / 'a.pth', pickle_protocol=protocol)
    loaded = load_from_local(str(tmp_path / 'a.pth'))['a']
    assert loaded == expected and type(loaded) is type(expected)
    if name == 'time in a zone':
        assert loaded.fold == (protocol > 3), 'Python writes it since protocol 4'


@pytest.mark.parametrize('new', [True, False], ids=['archive', 'before torch 1.6'])
@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_every_protocol_round_trips(protocol, new, tmp_path):
    """``torch.save(pickle_protocol=...)`` writes the one that it is asked for."""
    content = {
        'state_dict': torch.nn.BatchNorm2d(3).state_dict(),
        'loss': HistoryBuffer([1.0, 2.0], [1, 1]),
        'arrays': [np.arange(600.0).reshape(20, 30), np.asfortranarray(np.eye(2, 3)), np.zeros(0), np.float64(0.5)],
        'text': ['short', 'long' * 100, 'é中\U0001f600'],
        'bytes': [b'short', b'long' * 100],
    }
    path = tmp_path / 'a.pth'
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    loaded = read_checkpoint(path)
    assert loaded['text'] == content['text'] and loaded['bytes'] == content['bytes']
    assert loaded['loss'].mean() == 1.5 and loaded['arrays'][-1] == 0.5
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(loaded['arrays'], content['arrays']))
    assert all(torch.equal(loaded['state_dict'][key], tensor) for key, tensor in content['state_dict'].items())


def test_a_refusal_says_what_to_do(tmp_path):
    torch.save({'state_dict': {}, 'a': Calls(print, 'a')}, tmp_path / 'a.pth')
    wrong, expected = 'it asks for __builtin__.print', 'more than tensors and the training state of mmengine'
    with pytest.raises(CheckpointFileError, match=f'{expected} .{wrong}.; .* save its state dict alone: torch.save'):
        read_checkpoint(tmp_path / 'a.pth')
    (tmp_path / 'a.pth').write_bytes(hostile.archive(b'\x80\x02\x82\x01.'))
    with pytest.raises(CheckpointFileError, match='an instruction, .* that data does not need'):
        read_checkpoint(tmp_path / 'a.pth')


def test_the_gate_is_closed(tmp_path):
    """Without any one of the names and opcodes it lets pass, some checkpoint would not load."""
    names, opcodes = set(), set()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedulers = [OneCycleLR(optimizer, 1.0, total_steps=9, anneal_strategy=kind) for kind in ('cos', 'linear')]
    arrays = [np.zeros(1, dtype) for dtype in ('f4', 'f8', 'i4', 'i8', 'b1', 'u1')]
    arrays += [np.zeros(100), np.zeros(0)]
    content = dict(
        loss=HistoryBuffer([1.0], [1]), eta=np.float64(3), arrays=arrays, step=1 << 40, small=(1, 300, 70000)
    )
    content.update(schedulers=[scheduler.state_dict() for scheduler in schedulers], flags=(True, False, None, 0.5))
    content.update(args=argparse.Namespace(lr=0.1), plain=[value for value, _ in PLAIN.values()])
    factories = [bool, dict, float, frozenset, int, list, set, str, tuple]
    content.update(factories=[defaultdict(one) for one in factories], dtypes=[*DTYPES.values()])
    content.update(tensors=[torch.zeros(1).to(dtype) for dtype in savable_dtypes()])
    content.update(paths=[Path('a'), PureWindowsPath('a'), PurePosixPath('a')])
    content.update(tuples=((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), net=torch.nn.BatchNorm2d(3).state_dict())
    content.update(
        milestones=Counter([8, 11]),
        long=[*range(300)],
        words={str(i): i for i in range(300)},
        w=torch.nn.Parameter(torch.zeros(1)),
    )
    for protocol in (2, 3, 4, 5):
        torch.save(content, tmp_path / 'a.pth', pickle_protocol=protocol)
        for opcode, argument, _ in pickletools.genops(hostile.pickle_of(tmp_path / 'a.pth')):
            opcodes.add(ord(opcode.code))
            if opcode.name == 'GLOBAL':
                names.add(argument.replace(' ', '.'))
        read_checkpoint(tmp_path / 'a.pth')
    assert names <= {*MAKERS, *NAMES} and opcodes <= {*HANDLERS}
    other = {name for name in {*MAKERS, *NAMES} - names if 'Storage' not in name and 'numpy' not in name}
    other -= {name for name in other if name.startswith('pathlib.')}  # another system's, another Python's
    other -= {'torch._utils._rebuild_tensor_v3'} if TORCH < (2, 2) else set()  # of what an older torch cannot save
    assert other == {'torch._utils._rebuild_tensor', '__builtin__.int', '__builtin__.str'}, 'of old files'
    assert {*HANDLERS} - opcodes <= {ord('U'), ord('j')}, 'Python 2 text, and the 257th shared object'


def test_hostile_files_do_what_they_claim(tmp_path):
    """Read without care, they run: what is refused below is not refused for being broken."""
    marker, path = tmp_path / 'marker', tmp_path / 'a.pth'
    files = hostile.live(marker)
    assert len(files) >= 30
    for name, content in files.items():
        path.write_bytes(content)
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        assert marker.exists(), name
        marker.unlink()


def test_hostile_files_are_refused(hostile_files):
    """By this project's tools and by mmengine's loader, which every tool of the framework uses, at once."""
    paths, marker = hostile_files
    functions = torch.Tensor.isnan, HistoryBuffer.current, dict(HistoryBuffer._statistics_methods)
    for name, path in paths.items():
        for load in (read_checkpoint, CheckpointLoader.load_checkpoint):
            start = time.process_time()
            with pytest.raises(CheckpointFileError) as info:
                pytest.fail(f'{name}: {load(str(path))}')
            # two seconds on a quiet machine; a processor's other thread can take half of them
            assert time.process_time() - start < 4, name
            message = str(info.value)
            assert str(path) in message and '\n' not in message and len(message) < len(str(path)) + 400, (name, message)
            assert not marker.exists(), name
    assert functions == (torch.Tensor.isnan, HistoryBuffer.current, dict(HistoryBuffer._statistics_methods))


def test_a_file_cannot_change_the_framework(tmp_path):
    """mmengine's own loading lets a file replace functions of a class, and numpy's what a dtype means."""
    state = {**HistoryBuffer([1.0], [1]).__getstate__(), 'statistics_methods': {'mean': 1}}
    mean = HistoryBuffer._statistics_methods['mean']
    (tmp_path / 'a.pth').write_bytes(hostile.archive(hostile.opcodes([HistoryBuffer], b')\x81', [state], b'b')))
    with pytest.raises(CheckpointFileError, match='without its histories|none|damaged|holds a'):
        pytest.fail(str(load_from_local(str(tmp_path / 'a.pth'))))
    assert HistoryBuffer._statistics_methods['mean'] is mean
    forged = (3, '<', None, ('a',), {'a': (np.dtype('f4'), 0)}, 8, 1, 1)
    torch.save({'a': Calls(np.dtype, 'f8', False, True, state=forged)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointFileError, match='holds a Number'):
        read_checkpoint(tmp_path / 'a.pth')
    assert np.dtype('f8').fields is None


def test_two_archives_in_one_file(tmp_path):
    """What is loaded is what was checked, wherever another reader would look."""
    first, second = (
        hostile.saved(None, pickle_protocol=2).replace(b'payload', word) for word in (b'PAYLOAD', b'payl0ad')
    )
    path = tmp_path / 'a.pth'
    path.write_bytes(first + second)
    with contextlib.suppress(CheckpointFileError):
        assert 'PAYLOAD' not in read_checkpoint(path)
    bad = bytearray(hostile.archive(hostile.opcodes([{'state_dict': {}}]), bytes(64)))
    bad[bad.index(b'state_dict') + 1] ^= 1
    path.write_bytes(bytes(bad))
    with pytest.raises(CheckpointFileError, match='CRC'):
        read_checkpoint(path)


def test_torch_is_left_alone():
    assert torch.load.__module__ == 'torch.serialization'
    admitted = getattr(torch.serialization, 'get_safe_globals', list)()  # torch itself may admit types of its own
    assert not [one for one in admitted if not one.__module__.startswith('torch')]
