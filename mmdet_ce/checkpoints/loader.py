"""mmengine's loading of checkpoints, through the gate: what every tool of MMDetection then reads with."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Optional
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from mmengine import dist
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .files import CheckpointFileError, read_with_notes


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
    path = Path(filename).expanduser()
    checkpoint, notes = read_with_notes(path)
    if not isinstance(checkpoint, dict):
        raise CheckpointFileError(f'checkpoint {path} holds a {type(checkpoint).__name__}; expected a state dict')
    for note in notes:
        print_log(f'{path}: left out {note}', logger='current', level=logging.WARNING)
    on_cpu = map_location is None or callable(map_location) or torch.device(map_location).type == 'cpu'
    return checkpoint if on_cpu else _moved(checkpoint, torch.device(map_location))


def load_from_http(filename: str, map_location: Any = None, model_dir: Optional[str] = None) -> dict:
    """Load a checkpoint from a URL, downloaded once into torch's cache as mmengine does.

    Args:
        filename: The URL.
        map_location: As in ``load_from_local``.
        model_dir: A folder to keep the file in, in place of torch's cache.

    Raises:
        CheckpointFileError: As ``load_from_local``, and if the URL cannot be downloaded.
    """
    path = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'), Path(urlparse(filename).path).name)
    if dist.get_rank() == 0:
        _download(filename, path)
    dist.barrier()
    _download(filename, path)  # on other machines
    return load_from_local(str(path), map_location)


def _download(url: str, path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sha256 = torch.hub.HASH_REGEX.search(path.name)
    print_log(f'downloading {url} to {path}', logger='current')
    try:
        torch.hub.download_url_to_file(url, str(path), sha256[1] if sha256 else None, progress=os.isatty(0))
    except (OSError, RuntimeError, ValueError) as error:  # URLError is an OSError; RuntimeError: another hash
        reason = error.reason if isinstance(error, URLError) else error
        raise CheckpointFileError(f'checkpoint {url} could not be downloaded: {reason}') from None


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (list, tuple) else value
