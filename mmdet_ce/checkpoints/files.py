"""Files that are written whole or not at all, and read as data."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any, Union

import torch
from mmengine.fileio import LocalBackend, register_backend

from ..compat import TORCH


@register_backend('atomic')
class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, except that a file is written beside its place and then moved there.

    Example:
        >>> default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
    """

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write bytes to ``filepath``."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f'.{path.name}.tmp')
        try:
            with open(beside, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def put_text(self, obj: str, filepath: Union[str, Path], encoding: str = 'utf-8') -> None:
        """Write text to ``filepath``."""
        self.put(obj.encode(encoding), filepath)


def read_checkpoint(path: Union[str, Path]) -> Any:
    """Read a checkpoint, with torch's weights-only unpickler where it can.

    torch < 2.6 cannot read a training's checkpoint that way, and unpickles it, as mmengine does.
    """
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
