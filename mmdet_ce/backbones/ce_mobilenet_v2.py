"""MobileNetV2 with Channel Equilibrium."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from mmdet.models.backbones.mobilenet_v2 import MobileNetV2
from mmdet.models.layers import InvertedResidual
from mmdet.registry import MODELS
from torch import Tensor, nn

from ..layers.block_end import block_end, is_hooked
from .ce_backbone import CEBackbone, build_ce, check_stages, run_block


class CEInvertedResidual(InvertedResidual):
    """mmdet's InvertedResidual with a CE slot after the linear projection's norm, before the shortcut is added.

    Args:
        ce: Arguments of the block's ChannelEquilibrium, or None for a plain block.
        *args, **kwargs: See mmdet's InvertedResidual.
    """

    def __init__(self, *args: Any, ce: Optional[dict] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ce = None if ce is None else build_ce(ce, self.linear_conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Forward function."""

        def _inner_forward(x: Tensor) -> Tensor:
            out = self.expand_conv(x) if self.with_expand_conv else x
            out = self.depthwise_conv(out)
            if self.with_se:
                out = self.se(out)
            projection = self.linear_conv
            if self.ce is None or not projection.with_norm or is_hooked(projection):
                out = projection(out)
                out = out if self.ce is None else self.ce(out)
            elif self.with_res_shortcut and isinstance(self.drop_path, nn.Identity):
                return block_end(projection.conv(out), projection.norm, self.ce, shortcut=x)
            else:
                out = block_end(projection.conv(out), projection.norm, self.ce)
            return x + self.drop_path(out) if self.with_res_shortcut else out

        return run_block(self, _inner_forward, x)


@MODELS.register_module()
class CEMobileNetV2(CEBackbone, MobileNetV2):
    """mmdet's MobileNetV2 with Channel Equilibrium.

    CE is after the linear projection's norm of each inverted residual (``layerN.M.ce``): the last norm of the block, as
    in a ResNet. The paper does not say where its MobileNets have CE, and there are no published weights.

    Args:
        ce_cfg: Arguments of each ChannelEquilibrium. None switches CE off everywhere. Where ``num_channels`` does not
            divide a stage's channels it is halved until it does.
        stage_with_ce: For each of the seven stages, whether its blocks have CE. Defaults to all.
        ce_eval: See CEResNet.
        **kwargs: See mmdet's MobileNetV2.

    Raises:
        ValueError: If ``stage_with_ce`` does not have one value for each stage, or a CE argument is out of range.

    Example:
        >>> import torch
        >>> from mmdet_ce import CEMobileNetV2
        >>> for level in CEMobileNetV2().eval()(torch.rand(1, 3, 64, 64)):
        ...     print(tuple(level.shape))
        (1, 24, 16, 16)
        (1, 32, 8, 8)
        (1, 96, 4, 4)
        (1, 1280, 2, 2)
    """

    def __init__(
        self,
        *args: Any,
        ce_cfg: Optional[dict] = dict(num_channels=16),
        stage_with_ce: Optional[Sequence[bool]] = None,
        ce_eval: Optional[bool] = None,
        **kwargs: Any,
    ) -> None:
        num_stages = len(self.arch_settings)
        # Set before MobileNetV2's constructor, which calls make_layer.
        self.ce_cfg = ce_cfg
        self.stage_with_ce = check_stages(stage_with_ce, (True,) * num_stages, num_stages, ce_cfg)
        super().__init__(*args, ce_eval=ce_eval, **kwargs)

    def make_layer(self, out_channels: int, num_blocks: int, stride: int, expand_ratio: int) -> nn.Sequential:
        """Stack the inverted residuals of the next stage, with or without CE."""
        ce = self.ce_cfg if self.stage_with_ce[len(self.layers)] else None
        blocks = []
        for index in range(num_blocks):
            blocks.append(
                CEInvertedResidual(
                    self.in_channels,
                    out_channels,
                    mid_channels=int(round(self.in_channels * expand_ratio)),
                    stride=stride if index == 0 else 1,
                    with_expand_conv=expand_ratio != 1,
                    conv_cfg=self.conv_cfg,
                    norm_cfg=self.norm_cfg,
                    act_cfg=self.act_cfg,
                    with_cp=self.with_cp,
                    ce=ce,
                )
            )
            self.in_channels = out_channels
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of ``out_indices`` for images (N, 3, H, W)."""
        self.check_statistics()
        return super().forward(x)
