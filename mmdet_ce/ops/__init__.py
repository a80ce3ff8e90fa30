"""The mathematics of Channel Equilibrium as functions of tensors."""

from .mix import Affine, Moments, affine_of, mix, no_autocast
from .newton import inverse_sqrt_newton
from .reference import CEReferenceOutput, channel_equilibrium_reference

__all__ = [
    'Affine',
    'CEReferenceOutput',
    'Moments',
    'affine_of',
    'channel_equilibrium_reference',
    'inverse_sqrt_newton',
    'mix',
    'no_autocast',
]
