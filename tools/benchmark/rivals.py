"""Blocks that a user would pick instead of CE, in mmdet's ResNet, as a backbone that a config can name.

A config for tools/train.py imports it with ``custom_imports=dict(imports=['mmdet_ce', 'benchmark.rivals'])``.
"""

from __future__ import annotations

from typing import Any, Optional

from mmcv.cnn.bricks import ContextBlock
from mmdet.models import ResNet
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.layers import SELayer
from mmdet.registry import MODELS
from torch import nn


def build_rival(name: Optional[str], channels: int) -> nn.Module:
    """Return the block of a name: 'gc' (with the lighter ratio of mmdet's configs/gcnet) or 'se'; None does nothing."""
    if name is None:
        return nn.Identity()
    return {'gc': lambda: ContextBlock(channels, ratio=1 / 16), 'se': lambda: SELayer(channels)}[name]()


class RivalBasicBlock(BasicBlock):
    """mmdet's BasicBlock with another block after the last norm, where CE would be."""

    def __init__(self, *args: Any, rival: Optional[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rival = build_rival(rival, self.conv2.out_channels)

    @property
    def norm2(self) -> nn.Module:
        """The last norm and what follows it."""
        return lambda x: self.rival(getattr(self, self.norm2_name)(x))


class RivalBottleneck(Bottleneck):
    """mmdet's Bottleneck with another block after the last norm, where CE would be."""

    def __init__(self, *args: Any, rival: Optional[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rival = build_rival(rival, self.conv3.out_channels)

    @property
    def norm3(self) -> nn.Module:
        """The last norm and what follows it."""
        return lambda x: self.rival(getattr(self, self.norm3_name)(x))


@MODELS.register_module()
class RivalResNet(ResNet):
    """mmdet's ResNet with another block in its residual blocks. Their last norms do not start at zero, as with CE.

    Args:
        depth: See mmdet's ResNet.
        rival: 'gc' for mmcv's ContextBlock in stages 2 to 4, 'se' for squeeze-and-excitation in all.
        **kwargs: See mmdet's ResNet.
    """

    arch_settings = {
        depth: (RivalBasicBlock if block is BasicBlock else RivalBottleneck, stage_blocks)
        for depth, (block, stage_blocks) in ResNet.arch_settings.items()
    }

    def __init__(self, depth: int, rival: str, **kwargs: Any) -> None:
        self.rival = rival  # before ResNet's constructor, which calls the method below
        super().__init__(depth, **kwargs)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Pack all blocks of the next stage into a ``ResLayer``."""
        is_first = not self.res_layers
        return super().make_res_layer(rival=None if self.rival == 'gc' and is_first else self.rival, **kwargs)


def rivals(depth: int, **options: Any) -> dict[str, ResNet]:
    """Return the networks that a user would pick instead of one with CE."""
    names = {'plain + ContextBlock': 'gc', 'plain + SE': 'se'}
    return {title: RivalResNet(depth, rival, **options) for title, rival in names.items()}
