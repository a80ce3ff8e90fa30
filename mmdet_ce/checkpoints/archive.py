"""The containers that torch.save writes: an archive since torch 1.6, a row of pickles before.

What is checked is what is loaded: names, sizes and checksums are those of the bytes that the tensors are made of.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .makers import STORAGES, Token
from .unpickler import DataUnpickler

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before torch 1.6
SIZES = {dtype: torch.empty(0, dtype=dtype).element_size() for dtype in STORAGES.values()}
MAX_DIRECTORY = 4 << 20  # bytes of an archive's directory, which takes ten times the memory; 500 tensors have 50 KB
MAX_PREDICTION_OPCODES = 100_000_000  # COCO's 5000 validation images with masks take 8 million


def read_archive(file: BinaryIO) -> Any:
    """Return what a file of torch.save holds, as ``DataUnpickler`` makes it.

    Raises:
        pickle.UnpicklingError: If it asks for more than data, or its pickle is damaged.
        Exception: Nearly any, if the file is damaged.
    """
    is_archive = file.read(2) == b'PK'
    file.seek(0)
    if not is_archive:
        return _read_legacy(file)
    end = zipfile._EndRecData(file)
    if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY:
        raise pickle.UnpicklingError('it has more entries than any checkpoint')
    with zipfile.ZipFile(file) as archive:
        return _read_zip(archive, os.fstat(file.fileno()).st_size)


def read_pickle(file: BinaryIO) -> Any:
    """Return what a bare pickle holds that may hold tensors, as MMDetection dumps predictions."""
    makers = {'torch.storage._load_from_bytes': _nested}
    return DataUnpickler(file, _no_storage, makers, MAX_PREDICTION_OPCODES).load()


def _read_zip(archive: zipfile.ZipFile, length: int) -> Any:
    infos = archive.infolist()
    names = {info.filename for info in infos}
    stored = all(info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size for info in infos)
    if sum(info.file_size for info in infos) > length or not stored:
        raise pickle.UnpicklingError('it would unpack to more than it is, as no checkpoint of torch.save does')
    pickles = [name for name in names if name.count('/') == 1 and name.endswith('/data.pkl')]
    if len(names) != len(infos) or len(pickles) != 1:
        raise pickle.UnpicklingError('it is no archive of torch.save')
    folder = pickles[0][: -len('/data.pkl')]
    if f'{folder}/byteorder' in names and archive.read(f'{folder}/byteorder') != b'little':
        raise pickle.UnpicklingError('its numbers have another byte order than this machine')
    storages: dict[str, Tensor] = {}

    def storage(pid: Any) -> Tensor:
        dtype, key, numel = _described(pid, 5)
        if key not in storages:
            data = _content(archive, f'{folder}/data/{key}')
            storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return _expected(storages[key], dtype, numel)

    return DataUnpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


def _content(archive: zipfile.ZipFile, name: str) -> bytearray:
    """Return the bytes of an entry, in memory once; zipfile checks the checksum at the end."""
    data, place = bytearray(archive.getinfo(name).file_size), 0
    with archive.open(name) as entry:
        for chunk in iter(lambda: entry.read(1 << 20), b''):
            data[place : place + len(chunk)] = chunk
            place += len(chunk)
    if place != len(data):
        raise pickle.UnpicklingError('it is incomplete')
    return data


def _read_legacy(file: BinaryIO) -> Any:
    bytes_left = file.seek(0, io.SEEK_END)
    file.seek(0)
    storages: dict[str, Tensor] = {}

    def storage(pid: Any) -> Tensor:
        nonlocal bytes_left
        dtype, key, numel = _described(pid, 6)
        if key not in storages:
            bytes_left -= numel * SIZES[dtype]
            if pid[5] is not None or bytes_left < 0:
                raise pickle.UnpicklingError('it asks for a storage that it does not hold')
            storages[key] = torch.zeros(numel, dtype=dtype)
        return _expected(storages[key], dtype, numel)

    first = DataUnpickler(file, _no_storage).load() if file.read(1) == pickle.PROTO and not file.seek(0) else None
    if type(first) is not int or first != MAGIC:
        raise ValueError('torch.save did not write it')
    DataUnpickler(file, _no_storage).load()  # version of the format
    DataUnpickler(file, _no_storage).load()  # sizes of types on the machine that wrote it
    content = DataUnpickler(file, storage).load()
    keys = DataUnpickler(file, _no_storage).load()
    # Before they are hashed: the hash of a tuple that holds the one before twice, n times, takes 2^n steps.
    known = type(keys) is list and len(keys) == len(storages) and all(type(key) is str for key in keys)
    if not known or set(keys) != set(storages):
        raise pickle.UnpicklingError('it holds other storages than its tensors ask for')
    for key in keys:
        tensor, numel = storages[key], int.from_bytes(file.read(8), 'little')
        data = file.read(len(tensor) * tensor.element_size())
        if numel != len(tensor) or len(data) != numel * tensor.element_size():
            raise pickle.UnpicklingError('it is incomplete')
        if data:
            tensor.copy_(torch.frombuffer(bytearray(data), dtype=tensor.dtype))
    return content


def _described(pid: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Return dtype, key and size of a storage from its persistent id."""
    known = type(pid) is tuple and len(pid) == length and pid[0] == 'storage' and type(pid[1]) is Token
    dtype = STORAGES.get(pid[1].name.rpartition('.')[2]) if known else None
    if dtype is None or type(pid[2]) is not str or type(pid[4]) is not int or pid[4] < 0:
        raise pickle.UnpicklingError('it asks for a storage of an unknown kind')
    return dtype, pid[2], pid[4]


def _expected(storage: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    if storage.dtype != dtype or len(storage) != numel:
        raise pickle.UnpicklingError('it asks for a storage that it does not hold')
    return storage


def _no_storage(pid: Any) -> Tensor:
    raise pickle.UnpicklingError('it asks for a storage where none can be')


def _nested(data: Any) -> Tensor:
    storage = _read_legacy(io.BytesIO(data))
    if type(storage) is not Tensor:
        raise pickle.UnpicklingError('it asks for a storage that is none')
    return storage
