"""Backbones with Channel Equilibrium."""

from .ce_mobilenet_v2 import CEMobileNetV2
from .ce_resnet import CEResNet, CEResNetV1d
from .ce_resnext import CEResNeXt

__all__ = ['CEMobileNetV2', 'CEResNeXt', 'CEResNet', 'CEResNetV1d']
