"""Checkpoint files: written whole or not at all, read as data."""

from __future__ import annotations

import io
import os
import pickle
import uuid
from pathlib import Path
from typing import Any, Union

import torch
from mmengine.fileio import LocalBackend, register_backend

from ..compat import TORCH


@register_backend('atomic')
class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, written beside their place and then moved there.

    Example:
        >>> default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
    """

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write bytes to ``filepath``, whole or not at all."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')  # each writer has its own
        try:
            with open(beside, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def read_checkpoint(path: Union[str, Path]) -> Any:
    """Read a checkpoint as data. torch < 2.6 cannot for that of a training, and unpickles it, as mmengine does."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        if TORCH >= (2, 6):
            raise
        return torch.load(path, map_location='cpu', weights_only=False)


def write_checkpoint(checkpoint: Any, path: Union[str, Path]) -> None:
    """Write a checkpoint whole or not at all."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    AtomicLocalBackend().put(file.getvalue(), path)
