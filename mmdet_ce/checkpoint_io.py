"""Read checkpoints as data, write them whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch

from .safe_globals import register_safe_globals


class CheckpointFileError(Exception):
    """A checkpoint that cannot be read or written; the message is for the user."""


def read_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint with ``weights_only=True``: tensors, and what mmengine's checkpoints hold beside them.

    Raises:
        CheckpointFileError: If there is no such file, it is damaged, would unpack to more than it is, or asks for more
            than data. Nothing in it was run then.
    """
    register_safe_globals()
    path = Path(path)
    if not path.is_file():
        raise CheckpointFileError(f'checkpoint {path} not found')
    if not path.stat().st_size:
        raise CheckpointFileError(f'checkpoint {path} is empty; get it again')
    try:
        with open(path, 'rb') as file:
            is_archive = file.read(2) == b'PK'
        if is_archive and (size := _unpacked_size(path)) > path.stat().st_size:
            raise CheckpointFileError(
                f'checkpoint {path} was refused: it would unpack to {size} bytes, more than it has itself; expected an '
                'archive without compression, as torch.save writes it'
            )
        return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointFileError(f'{path}: {refusal_reason(error)}') from error
    except OSError as error:
        raise CheckpointFileError(f'checkpoint {path} cannot be read: {error.strerror or error}') from error
    except CheckpointFileError:
        raise
    except Exception as error:  # torch raises nearly anything for a damaged file
        reason = str(error).split('\n')[0].split(' In PyTorch ')[0] or type(error).__name__  # without torch's advice
        raise CheckpointFileError(f'checkpoint {path} is damaged or no checkpoint ({reason}); get it again') from error


def state_dict_of(checkpoint: Any, path: str | Path) -> dict[str, Any]:
    """Return the state dict in what was read from ``path``: under that name, or all of it.

    Raises:
        ValueError: If there is none.
    """
    state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict):
        raise ValueError(f'{path} holds no state dict; expected a checkpoint of a training, like epoch_12.pth')
    return state_dict


def _unpacked_size(archive: Path) -> int:
    """Return the bytes that an archive says it holds. Neither compression nor overlap can hide from this sum."""
    with zipfile.ZipFile(archive) as file:
        return sum(info.file_size for info in file.infolist())


def refusal_reason(error: pickle.UnpicklingError) -> str:
    """Say why torch refused a file, without its advice on how to get around the refusal."""
    lines = [line.strip() for line in str(error).split('Check the documentation')[0].splitlines()]
    causes = [line for line in lines if line and 'weights_only' not in line]
    reason = causes[-1].split(' Please ')[0].removeprefix('WeightsUnpickler error: ') if causes else 'no pickle'
    return (
        'a checkpoint was refused, and nothing in it was run: it is damaged, or asks for more than tensors and the '
        f'training state of mmengine ({reason})'
    )


def find_damage(path: str | Path) -> Optional[str]:
    """Return what is wrong with a local file as a checkpoint of torch.save, or None for a whole one.

    Every byte is held against the checksums in the file, at about a third of the time that loading it takes. The format
    of before torch 1.6 has none: of that only the first byte is looked at.
    """
    try:
        with open(path, 'rb') as file:
            start = file.read(2)
            if start != b'PK':
                known = start[:1] == b'\x80'  # the bare pickle of old versions
                return None if known else 'is not a checkpoint of torch.save' if start else 'is empty'
            if _unpacked_size(path) > os.fstat(file.fileno()).st_size:
                return 'would unpack to more than it is, as no checkpoint of torch.save does'
            part = zipfile.ZipFile(file).testzip()
    except OSError as error:
        return f'cannot be read ({error.strerror or error})'
    except Exception:  # zipfile raises nearly anything for a damaged file
        return 'is incomplete: it starts as a checkpoint and does not end as one'
    return f'is damaged: the checksum of {part} in it is wrong' if part else None


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
