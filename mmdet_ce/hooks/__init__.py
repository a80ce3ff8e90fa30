"""Hooks for mmengine's Runner."""

from .calibration_hook import CECalibrationHook

__all__ = ['CECalibrationHook']
