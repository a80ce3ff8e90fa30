"""Hooks for mmengine's Runner."""

from .atomic_checkpoint_hook import AtomicCheckpointHook
from .calibration_hook import CECalibrationHook
from .channel_statistics_hook import ChannelStatisticsHook

__all__ = ['AtomicCheckpointHook', 'CECalibrationHook', 'ChannelStatisticsHook']
