"""The mathematics of Channel Equilibrium as functions of tensors."""

from .moments import Moments, moments, spatial_variance
from .newton import inverse_sqrt_newton
from .reference import CEReferenceOutput, channel_equilibrium_reference

__all__ = [
    'CEReferenceOutput',
    'Moments',
    'channel_equilibrium_reference',
    'inverse_sqrt_newton',
    'moments',
    'spatial_variance',
]
