"""Hooks for mmengine's Runner."""

from .calibration_hook import CECalibrationHook
from .channel_statistics_hook import ChannelStatisticsHook

__all__ = ['CECalibrationHook', 'ChannelStatisticsHook']
