"""Checkpoints: read as data, written whole, resumed from, and converted from the authors' layout."""

from .files import (
    CheckpointFileError,
    printable,
    read_checkpoint,
    read_predictions,
    sha256,
    state_dict_of,
    whole_file,
    write_checkpoint,
)
from .folder_lock import FolderInUseError, FolderLock, lock_folder
from .loader import load_from_http, load_from_local, register_loaders

__all__ = [
    'CheckpointFileError',
    'FolderInUseError',
    'FolderLock',
    'load_from_http',
    'load_from_local',
    'lock_folder',
    'printable',
    'read_checkpoint',
    'read_predictions',
    'register_loaders',
    'sha256',
    'state_dict_of',
    'whole_file',
    'write_checkpoint',
]
