"""Backbones registered in ``mmdet.registry.MODELS``."""

from .ce_resnet import CEBasicBlock, CEBottleneck, CEResNet

__all__ = ['CEBasicBlock', 'CEBottleneck', 'CEResNet']
