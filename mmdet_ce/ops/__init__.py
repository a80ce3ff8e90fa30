"""The mathematics of Channel Equilibrium as functions of tensors."""

from .newton import inverse_sqrt_newton
from .operator import CEOutput, channel_equilibrium
from .reference import channel_equilibrium_reference

__all__ = ['CEOutput', 'channel_equilibrium', 'channel_equilibrium_reference', 'inverse_sqrt_newton']
