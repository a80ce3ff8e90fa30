"""ResNet with Channel Equilibrium, placed as in the released CE-ResNet-50."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.registry import MODELS
from torch import Tensor, nn

from ..layers.block_end import block_end
from .ce_backbone import CEBackbone, build_ce, check_stages, run_block


class CEBasicBlock(BasicBlock):
    """mmdet's BasicBlock with a CE slot after the last norm, before the shortcut is added.

    Args:
        ce: Arguments of the block's ChannelEquilibrium, or None for a plain block.
        *args, **kwargs: See mmdet's BasicBlock.
    """

    def __init__(self, *args: Any, ce: Optional[dict] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ce = None if ce is None else build_ce(ce, self.conv2.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Forward function."""

        def _inner_forward(x: Tensor) -> Tensor:
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.conv2(out)
            identity = x if self.downsample is None else self.downsample(x)
            return block_end(out, self.norm2, self.ce, shortcut=identity, relu=self.relu)

        return run_block(self, _inner_forward, x)


class CEBottleneck(Bottleneck):
    """mmdet's Bottleneck with a CE slot after the last norm, before plugins there and before the shortcut is added.

    Args:
        ce: Arguments of the block's ChannelEquilibrium, or None for a plain block.
        ce_position: 'after_norm3', or 'after_norm2' for the place before the second ReLU.
        *args, **kwargs: See mmdet's Bottleneck.
    """

    def __init__(self, *args: Any, ce: Optional[dict] = None, ce_position: str = 'after_norm3', **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ce_position = ce_position
        conv = self.conv3 if ce_position == 'after_norm3' else self.conv2
        self.ce = None if ce is None else build_ce(ce, conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Forward function."""

        def _inner_forward(x: Tensor) -> Tensor:
            out = self.relu(self.norm1(self.conv1(x)))
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv1_plugin_names)
            out = block_end(self.conv2(out), self.norm2, self._ce_at('after_norm2'), relu=self.relu)
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv2_plugin_names)
            ce = self._ce_at('after_norm3')
            if self.with_plugins and self.after_conv3_plugin_names:
                out = block_end(out, self.norm3, ce, conv=self.conv3)
                out = self.forward_plugin(out, self.after_conv3_plugin_names)
                out += x if self.downsample is None else self.downsample(x)
                return self.relu(out)
            identity = x if self.downsample is None else self.downsample(x)
            return block_end(out, self.norm3, ce, conv=self.conv3, shortcut=identity, relu=self.relu)

        return run_block(self, _inner_forward, x)

    def _ce_at(self, position: str) -> Optional[nn.Module]:
        return self.ce if self.ce_position == position else None


@MODELS.register_module()
class CEResNet(CEBackbone, ResNet):
    """mmdet's ResNet with Channel Equilibrium.

    By default CE is where the released network has it: in the stem (``ce1``, between norm and ReLU) and in every
    residual block of stages 1 to 3 (``layerN.M.ce``), none in stage 4. With CE switched off everywhere it is mmdet's
    ResNet: names, random start, and outputs, gradients and running values to the bit (with ``with_cp=True``, gradients
    up to rounding).

    ``frozen_stages`` freezes CE together with its stage, and the stem's with the stem. ``norm_eval=True``, mmdet's
    default, puts CE in evaluation together with the norms: its running statistics are used and left alone, so they
    must come from a checkpoint. Unset statistics in use are reported once, by layer name.

    Paper: `Channel Equilibrium Networks for Learning Deep Representation <https://arxiv.org/abs/2003.00214>`_.

    Args:
        *args: See mmdet's ResNet.
        ce_cfg: Arguments of each ChannelEquilibrium. None switches CE off everywhere.
        stage_with_ce: For each stage, whether its blocks have CE. Defaults to the first three stages.
        stem_with_ce: Whether the stem has CE.
        stem_ce_cfg: Arguments that override ``ce_cfg`` in the stem.
        ce_position: Where in a bottleneck CE is: 'after_norm3', or 'after_norm2', before the second ReLU, which the
            paper studies too.
        ce_eval: ``True``: CE uses its stored statistics during training, like a frozen norm. ``False``: it uses the
            batch's and updates the stored ones. ``None``: as ``norm_eval`` says. Frozen stages stay in evaluation.
        zero_init_residual: Whether to zero the last norm of each block where weights are initialized at random. None
            zeroes it where no CE follows it, as the released network has it: CE is invariant to its input's scale
            in one branch, so a small gamma before it does not make a small residual. If ``ce_cfg`` is None, it
            behaves as in mmdet's ResNet, and None is mmdet's default.
        **kwargs: See mmdet's ResNet.

    Raises:
        TypeError: If an argument is unknown, or ``ce_eval`` is neither True, False nor None.
        ValueError: If ``stage_with_ce`` does not have one value for each stage, ``ce_position`` is none of the above
            or the network has no bottlenecks for it, ``ce_cfg`` is not a dict, or a CE argument is out of range.

    Example:
        >>> import torch
        >>> from mmdet_ce import CEResNet
        >>> backbone = CEResNet(depth=18)
        >>> for level in backbone.eval()(torch.rand(1, 3, 32, 32)):
        ...     print(tuple(level.shape))
        (1, 64, 8, 8)
        (1, 128, 4, 4)
        (1, 256, 2, 2)
        (1, 512, 1, 1)
    """

    arch_settings = {
        depth: (CEBasicBlock if block is BasicBlock else CEBottleneck, stage_blocks)
        for depth, (block, stage_blocks) in ResNet.arch_settings.items()
    }
    plain_zero_init = True  # whether mmdet's class knows zero_init_residual

    def __init__(
        self,
        *args: Any,
        ce_cfg: Optional[dict] = dict(num_channels=16),
        stage_with_ce: Optional[Sequence[bool]] = None,
        stem_with_ce: bool = True,
        stem_ce_cfg: Optional[dict] = dict(num_channels=64),
        ce_position: str = 'after_norm3',
        ce_eval: Optional[bool] = None,
        zero_init_residual: Optional[bool] = None,
        **kwargs: Any,
    ) -> None:
        # Set before ResNet's constructor, which calls the methods below.
        self.ce_cfg = ce_cfg
        self.stage_with_ce = stage_with_ce
        self.stem_with_ce = stem_with_ce
        self.stem_ce_cfg = stem_ce_cfg
        self.ce_position = ce_position
        self._random_init = kwargs.get('init_cfg') is None and kwargs.get('pretrained') is None
        super().__init__(*args, ce_eval=ce_eval, zero_init_residual=zero_init_residual, **kwargs)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Pack all blocks of the next stage, with or without CE, into a ``ResLayer``."""
        ce = self.ce_cfg if self.stage_with_ce[len(self.res_layers)] else None
        if self._random_init and self._zeroes_last_norms(ce):
            # ResNet does this for its own block classes only.
            last_norm = 'norm3' if issubclass(self.block, Bottleneck) else 'norm2'
            kwargs['init_cfg'] = dict(type='Constant', val=0, override=dict(name=last_norm))
        if issubclass(self.block, Bottleneck):
            kwargs['ce_position'] = self.ce_position
        return super().make_res_layer(ce=ce, **kwargs)

    def _zeroes_last_norms(self, ce: Optional[dict]) -> bool:
        """Return whether the last norm of each block of a stage starts at zero; ``ce`` are the CE arguments there."""
        if self.stem_ce_cfg is None and not any(self.stage_with_ce):
            return self.plain_zero_init and self.zero_init_residual in (None, True)
        if self.zero_init_residual is None:
            return ce is None or self.ce_position != 'after_norm3'
        return self.zero_init_residual

    def _check_ce_arguments(self) -> None:
        if self.ce_position not in ('after_norm3', 'after_norm2'):
            raise ValueError(f"ce_position must be 'after_norm3' or 'after_norm2', got {self.ce_position!r}")
        if self.ce_position == 'after_norm2' and not issubclass(self.block, Bottleneck):
            raise ValueError(
                f"ce_position='after_norm2' needs bottlenecks, and depth {self.depth} has none; leave it out"
            )
        default = (True, True, True, False)[: self.num_stages]
        self.stage_with_ce = check_stages(self.stage_with_ce, default, self.num_stages, self.ce_cfg)
        has_stem_ce = self.ce_cfg is not None and self.stem_with_ce
        self.stem_ce_cfg = {**self.ce_cfg, **(self.stem_ce_cfg or {})} if has_stem_ce else None

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        self._check_ce_arguments()  # here, where ResNet's constructor has just checked its own
        super()._make_stem_layer(in_channels, stem_channels)
        self.ce1 = None if self.stem_ce_cfg is None else build_ce(self.stem_ce_cfg, stem_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of ``out_indices`` for images (N, 3, H, W)."""
        self.check_statistics()
        if not self.deep_stem:
            x = block_end(self.conv1(x), self.norm1, self.ce1, relu=self.relu)
        elif self.ce1 is None:
            x = self.stem(x)
        else:
            *layers, norm, relu = self.stem
            for layer in layers:
                x = layer(x)
            x = block_end(x, norm, self.ce1, relu=relu)
        x = self.maxpool(x)
        outs = []
        for i, layer_name in enumerate(self.res_layers):
            x = getattr(self, layer_name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        if self.frozen_stages >= 0 and self.ce1 is not None:
            self.ce1.eval()
            self.ce1.requires_grad_(False)


@MODELS.register_module()
class CEResNetV1d(CEResNet):
    """mmdet's ResNetV1d with Channel Equilibrium: a deep stem, CE after its last norm, and average-pooled shortcuts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=True, **kwargs)
