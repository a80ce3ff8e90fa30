"""The mathematics of Channel Equilibrium as functions of tensors."""

from .newton import inverse_sqrt_newton
from .operator import channel_equilibrium

__all__ = ['channel_equilibrium', 'inverse_sqrt_newton']
