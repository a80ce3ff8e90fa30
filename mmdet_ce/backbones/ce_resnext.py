"""ResNeXt with Channel Equilibrium."""

from __future__ import annotations

from typing import Any

from mmdet.models.backbones.resnext import Bottleneck as ResNeXtBottleneck
from mmdet.models.backbones.resnext import ResNeXt
from mmdet.registry import MODELS
from torch import nn

from .ce_resnet import CEBottleneck, CEResNet


class CEResNeXtBottleneck(CEBottleneck, ResNeXtBottleneck):
    """mmdet's ResNeXt bottleneck with a CE slot."""


@MODELS.register_module()
class CEResNeXt(CEResNet):
    """mmdet's ResNeXt with Channel Equilibrium, placed as in CEResNet.

    Args:
        groups: Groups of the 3x3 convolutions.
        base_width: Width of a group.
        **kwargs: See CEResNet; ``depth`` is 50, 101 or 152.
    """

    arch_settings = {depth: (CEResNeXtBottleneck, blocks) for depth, (_, blocks) in ResNeXt.arch_settings.items()}
    plain_zero_init = False  # mmdet's ResNeXt leaves zero_init_residual without effect

    def __init__(self, groups: int = 1, base_width: int = 4, **kwargs: Any) -> None:
        self.groups = groups
        self.base_width = base_width
        super().__init__(**kwargs)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Pack all blocks of the next stage into a ``ResLayer``."""
        return super().make_res_layer(
            groups=self.groups, base_width=self.base_width, base_channels=self.base_channels, **kwargs
        )
