"""The place where scripts import the conversion from; it lives in ``mmdet_ce.checkpoints.official``."""

from .checkpoints.official import BLOCK_NAMES, convert_official_state_dict

__all__ = ['BLOCK_NAMES', 'convert_official_state_dict']
