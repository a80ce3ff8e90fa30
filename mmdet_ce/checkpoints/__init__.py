"""Checkpoints: read as data, written whole, resumed from, and converted from the authors' layout."""

from .files import (
    CheckpointFileError,
    FolderInUseError,
    load_local,
    lock_folder,
    read_checkpoint,
    read_predictions,
    register_loader,
    sha256,
    state_dict_of,
    whole_file,
    write_checkpoint,
)

__all__ = [
    'CheckpointFileError',
    'FolderInUseError',
    'load_local',
    'lock_folder',
    'read_checkpoint',
    'read_predictions',
    'register_loader',
    'sha256',
    'state_dict_of',
    'whole_file',
    'write_checkpoint',
]
