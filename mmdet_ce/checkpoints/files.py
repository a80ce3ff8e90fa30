"""Read checkpoints as data, write them whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .archive import read_archive, read_pickle
from .schema import Tree, check_training

MAX_PREDICTION_VALUES = 100_000_000
MAX_SHARING = 4  # times the bytes of a file that its tensors may take: several may look at one storage


class CheckpointFileError(Exception):
    """A checkpoint that cannot be read or written; the message is for the user."""


def read_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint as data: tensors, and what mmengine's checkpoints hold beside them.

    Raises:
        CheckpointFileError: If there is no such file, it is damaged, or holds more than data. Nothing in it was run.
    """
    return read_with_notes(path)[0]


def read_predictions(path: str | Path) -> list[dict]:
    """Read the predictions that MMDetection's ``tools/test.py --out`` writes, as data.

    Raises:
        CheckpointFileError: If the file cannot be read, or is something else. Nothing in it was run.
    """
    expected = 'expected what tools/test.py --out writes'
    try:
        with _opened(path, 'write them again') as (file, size):
            predictions = Tree(MAX_SHARING * size, MAX_PREDICTION_VALUES).check(read_pickle(file))
    except CheckpointFileError as error:
        raise CheckpointFileError(f'{printable(path)} holds no predictions: {error}; {expected}') from None
    if type(predictions) is not list or any(type(one) is not dict for one in predictions):
        raise CheckpointFileError(f'{printable(path)} holds no predictions; {expected}')
    return predictions


def read_with_notes(path: str | Path) -> tuple[Any, list[str]]:
    """Return what ``read_checkpoint`` does, and a line for each part that was left out."""
    next_step = 'get it again, or where you trust it save its state dict alone: torch.save(state_dict, PATH)'
    with _opened(path, next_step) as (file, size):
        checkpoint = Tree(MAX_SHARING * size).check(read_archive(file))
        return checkpoint, check_training(checkpoint, Path(path).absolute()) if isinstance(checkpoint, dict) else []


@contextlib.contextmanager
def _opened(path: str | Path, next_step: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file that may be damaged or hostile; give the file and its size.

    Args:
        path: The file.
        next_step: What the user can do about a refused file.

    Raises:
        CheckpointFileError: If it cannot be opened, and in place of any error in the block.
    """
    name = f'checkpoint {printable(path)}'
    try:
        path = Path(path)
        if not path.exists():
            raise CheckpointFileError(f'{name} not found')
        if not path.is_file():  # a pipe would be waited for
            raise CheckpointFileError(f'{name} is no file')
        size = path.stat().st_size
        if not size:
            raise CheckpointFileError(f'{name} is empty; get it again')
        with open(path, 'rb') as file:
            yield file, size
    except CheckpointFileError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointFileError(
            f'{name} was refused, and nothing in it was run: it is damaged, or holds more than tensors and '
            f'the training state of mmengine ({error}); {next_step}'
        ) from None
    except (OSError, MemoryError) as error:
        cause = getattr(error, 'strerror', None) or type(error).__name__
        raise CheckpointFileError(f'{name} cannot be read: {cause}') from None
    except Exception as error:  # a damaged file raises nearly anything
        reason = f'{type(error).__name__}: {printable(error)[:80]}'
        raise CheckpointFileError(f'{name} is incomplete, damaged or no checkpoint ({reason}); get it again') from None


def printable(text: Any) -> str:
    """Return a text from elsewhere in one line of at most 300 characters, without those that steer a terminal."""
    return ''.join(c if c.isprintable() else '?' for c in str(text)[:300])


def state_dict_of(checkpoint: Any, path: str | Path) -> dict[str, Any]:
    """Return the state dict in what was read from ``path``: under that name, or all of it.

    Raises:
        ValueError: If there is none.
    """
    state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict):
        raise ValueError(f'{path} holds no state dict; expected a checkpoint of a training, like epoch_12.pth')
    return state_dict


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its place at ``path`` when it is complete, and never before.

    It is written beside its place and moved there. What a kill leaves is a hidden file, ``.NAME.*.tmp``.
    """
    path = Path(path).resolve()  # a link stays a link
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, 'a device, not a file', str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp', delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # a temporary file is its owner's alone
        os.replace(temporary, path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_checkpoint(checkpoint: Any, path: str | Path) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        CheckpointFileError: If it could not be written; what was at ``path`` before is then untouched.
    """
    try:
        with whole_file(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError, pickle.PicklingError) as error:  # torch reports a full disk as a RuntimeError
        cause = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise CheckpointFileError(f'{path} could not be written ({cause}); nothing was left there') from error


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
