"""The mathematics of Channel Equilibrium as functions of tensors."""

from .fused import Affine, affine_of, channel_equilibrium
from .newton import inverse_sqrt_newton
from .reference import CEOutput, channel_equilibrium_reference

__all__ = [
    'Affine',
    'CEOutput',
    'affine_of',
    'channel_equilibrium',
    'channel_equilibrium_reference',
    'inverse_sqrt_newton',
]
