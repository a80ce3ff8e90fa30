"""Read checkpoints as data, write them whole."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from .safe_globals import register_safe_globals


class CheckpointFileError(Exception):
    """A checkpoint that cannot be read or written; the message is for the user."""


def read_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint with ``weights_only=True``: tensors, and what mmengine's checkpoints hold beside them.

    Raises:
        CheckpointFileError: If there is no such file, it is damaged, or it asks for more than data.
    """
    register_safe_globals()
    path = Path(path)
    if not path.is_file():
        raise CheckpointFileError(f'checkpoint {path} not found')
    if not path.stat().st_size:
        raise CheckpointFileError(f'checkpoint {path} is empty; get it again')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointFileError(f'{path}: {refusal_reason(error)}') from error
    except OSError as error:
        raise CheckpointFileError(f'checkpoint {path} cannot be read: {error.strerror or error}') from error
    except Exception as error:  # torch raises nearly anything for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointFileError(f'checkpoint {path} is damaged or no checkpoint ({reason}); get it again') from error


def refusal_reason(error: pickle.UnpicklingError) -> str:
    """Say why torch refused a file, without its advice on how to get around the refusal."""
    causes = [line for line in str(error).splitlines() if 'GLOBAL' in line or 'Unpickler error' in line]
    reason = causes[0].split(' Please ')[0].strip() if causes else 'its pickle cannot be read'
    return (
        'a checkpoint was refused, and nothing in it was run: it is damaged, or asks for more than tensors and the '
        f'training state of mmengine ({reason})'
    )


def write_checkpoint(checkpoint: Any, path: str | Path) -> None:
    """Write a checkpoint whole or not at all: beside its place, then moved there.

    Raises:
        CheckpointFileError: If it could not be written; what was at ``path`` before is then untouched.
    """
    path = Path(path).resolve()  # a link stays a link
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp', delete=False) as file:
            temporary = Path(file.name)
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # a temporary file is its owner's alone
        os.replace(temporary, path)
    except (OSError, RuntimeError, pickle.PicklingError) as error:  # torch reports a full disk as a RuntimeError
        cause = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise CheckpointFileError(f'{path} could not be written ({cause}); nothing was left there') from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
