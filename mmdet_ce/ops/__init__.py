"""The mathematics of Channel Equilibrium as functions of tensors."""

from .channel_equilibrium import channel_equilibrium
from .newton import inverse_sqrt_newton
from .norm_affine import EvalNorm
from .output import CEOutput
from .reference import channel_equilibrium_reference

__all__ = ['CEOutput', 'EvalNorm', 'channel_equilibrium', 'channel_equilibrium_reference', 'inverse_sqrt_newton']
