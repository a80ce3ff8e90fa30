"""Layers registered in ``mmdet.registry.MODELS``."""

from .channel_equilibrium import BatchDecorrelation, ChannelEquilibrium, InstanceReweighting

__all__ = ['BatchDecorrelation', 'ChannelEquilibrium', 'InstanceReweighting']
