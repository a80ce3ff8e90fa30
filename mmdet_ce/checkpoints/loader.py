"""mmengine's loading of checkpoints, through the gate: what every tool of MMDetection then reads with."""

from __future__ import annotations

import logging
import os
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, Optional
from urllib.parse import urlparse

import torch
from mmengine import dist
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .files import CheckpointFileError, printable, read_with_notes


def register_loaders() -> None:
    """Let mmengine read checkpoints from files and from http(s) as data; safe to call again.

    Other schemes (``torchvision://``, ``open-mmlab://``, ``s3://`` and the like) stay with mmengine and torch.load.
    """
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load_from_http, force=True)


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """Load a checkpoint for mmengine, which takes this function in place of torch.load.

    Args:
        filename: The file.
        map_location: A device to move the tensors to; tensors stay on the CPU for what is no device.

    Raises:
        CheckpointFileError: As ``read_checkpoint``, and if the file holds no dict.
    """
    path = Path(os.path.expanduser(filename))
    checkpoint, notes = read_with_notes(path)
    if not isinstance(checkpoint, dict):
        raise CheckpointFileError(
            f'checkpoint {printable(path)} holds a {type(checkpoint).__name__}; expected a state dict'
        )
    if notes:
        more = f' and {len(notes) - 3} more parts' if len(notes) > 3 else ''
        line = f'{printable(path)}: left out {", ".join(notes[:3])}{more}'
        print_log(line, logger='current', level=logging.WARNING)
    device = torch.device(map_location if isinstance(map_location, (str, int, torch.device)) else 'cpu')
    return checkpoint if device.type == 'cpu' else _moved(checkpoint, device, {})


def load_from_http(filename: str, map_location: Any = None, model_dir: Optional[str] = None) -> dict:
    """Load a checkpoint from a URL, downloaded once into torch's cache as mmengine does.

    Args:
        filename: The URL.
        map_location: As in ``load_from_local``.
        model_dir: A folder to keep the file in, in place of torch's cache.

    Raises:
        CheckpointFileError: As ``load_from_local``, and if the URL cannot be downloaded.
    """
    new = _download(filename, model_dir) if dist.get_rank() == 0 else None
    dist.barrier()
    new = new or _download(filename, model_dir)  # on other machines
    checkpoint, refused = None, None
    try:
        checkpoint = load_from_local(str(new.path), map_location)
    except CheckpointFileError as error:
        refused = error
    dist.barrier()  # each process has read it
    if refused is not None:
        if new.is_new:  # else it would be taken again the next time
            new.path.unlink()
        raise refused
    return checkpoint


class _Download(NamedTuple):
    path: Path
    is_new: bool


def _download(url: str, model_dir: Optional[str]) -> _Download:
    """Download a file that is not there yet; the hash in a name like resnet50-0676ba61.pth is checked."""
    try:
        path = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'), Path(urlparse(url).path).name)
        if path.exists():
            return _Download(path, False)
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = re.search(r'-([a-f0-9]{8,})\.', path.name)
        print_log(f'downloading {printable(url)} to {printable(path)}', logger='current')
        torch.hub.download_url_to_file(url, str(path), sha256 and sha256[1], progress=os.isatty(0))
        return _Download(path, True)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:  # RuntimeError: another hash
        reason = printable(getattr(error, 'reason', None) or error or type(error).__name__)
        raise CheckpointFileError(f'checkpoint {printable(url)} could not be downloaded: {reason}') from None


def _moved(value: Any, device: torch.device, done: dict[int, Tensor]) -> Any:
    """Return a tree with its tensors on a device; one that stands in several places is moved once."""
    if isinstance(value, Tensor):
        if id(value) not in done:
            done[id(value)] = value.to(device)
        return done[id(value)]
    if type(value) is dict:
        return {key: _moved(item, device, done) for key, item in value.items()}
    return type(value)(_moved(item, device, done) for item in value) if type(value) in (list, tuple) else value
