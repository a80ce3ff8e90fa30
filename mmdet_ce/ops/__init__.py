"""The mathematics of Channel Equilibrium as functions of tensors."""

from .newton import inverse_sqrt_newton
from .operator import CEOutput, channel_equilibrium

__all__ = ['CEOutput', 'channel_equilibrium', 'inverse_sqrt_newton']
