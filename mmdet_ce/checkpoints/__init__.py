"""Checkpoints: read as data, written whole, and converted from the authors' layout."""

from .files import AtomicLocalBackend, read_checkpoint, write_checkpoint
from .official import convert_official_state_dict

__all__ = ['AtomicLocalBackend', 'convert_official_state_dict', 'read_checkpoint', 'write_checkpoint']
