"""ResNet with Channel Equilibrium, placed as in the released CE-ResNet-50."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import ChannelEquilibrium
from ..loading import missing_weights_message, summarize_load


def build_ce(ce_cfg: dict, in_channels: int) -> ChannelEquilibrium:
    """Build the CE layer of a slot from ``ce_cfg``; its type, if given, names a subclass of ChannelEquilibrium."""
    return MODELS.build({'type': ChannelEquilibrium, **ce_cfg, 'in_channels': in_channels})


def norm_ce(norm: nn.Module, ce: Optional[ChannelEquilibrium], x: Tensor) -> Tensor:
    """Return CE(norm(x)), or norm(x) where there is no CE.

    A BatchNorm in evaluation is an affine map, and CE takes it into its own product: one pass over x instead of two.
    Where somebody has hooked either module, both are called in turn, so that the hooks see what they expect.
    """
    if ce is None:
        return norm(x)
    # Exactly these classes: a subclass may compute something else.
    foldable = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and type(ce) is ChannelEquilibrium
    if foldable and not norm.training and norm.track_running_stats and not _has_hooks(norm) and not _has_hooks(ce):
        return ce(x, norm)
    return ce(norm(x))


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class CEBasicBlock(BasicBlock):
    """mmdet's BasicBlock with a CE slot after the last norm, before the shortcut is added.

    Args:
        *args: See mmdet's BasicBlock.
        ce: Arguments of the block's ChannelEquilibrium, or None for a plain block.
        **kwargs: See mmdet's BasicBlock.
    """

    def __init__(self, *args: Any, ce: Optional[dict] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ce = None if ce is None else build_ce(ce, self.conv2.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Forward function."""

        def _inner_forward(x: Tensor) -> Tensor:
            out = self.relu(self.norm1(self.conv1(x)))
            out = norm_ce(self.norm2, self.ce, self.conv2(out))
            identity = x if self.downsample is None else self.downsample(x)
            out += identity
            return out

        return self.relu(_run(self, _inner_forward, x))


class CEBottleneck(Bottleneck):
    """mmdet's Bottleneck with a CE slot after the last norm, before plugins there and before the shortcut is added.

    Args:
        *args: See mmdet's Bottleneck.
        ce: Arguments of the block's ChannelEquilibrium, or None for a plain block.
        **kwargs: See mmdet's Bottleneck.
    """

    def __init__(self, *args: Any, ce: Optional[dict] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ce = None if ce is None else build_ce(ce, self.conv3.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Forward function."""

        def _inner_forward(x: Tensor) -> Tensor:
            out = self.relu(self.norm1(self.conv1(x)))
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv1_plugin_names)
            out = self.relu(self.norm2(self.conv2(out)))
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv2_plugin_names)
            out = norm_ce(self.norm3, self.ce, self.conv3(out))
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv3_plugin_names)
            identity = x if self.downsample is None else self.downsample(x)
            out += identity
            return out

        return self.relu(_run(self, _inner_forward, x))


def _run(block: BaseModule, inner_forward: Any, x: Tensor) -> Tensor:
    """Run a block's inner forward, under activation checkpointing if the block asks for it."""
    if block.with_cp and x.requires_grad:
        return checkpoint(inner_forward, x, use_reentrant=False)
    return inner_forward(x)


@MODELS.register_module()
class CEResNet(ResNet):
    """mmdet's ResNet with Channel Equilibrium.

    By default CE sits where the released network has it: in the stem (``ce1``, between norm and ReLU) and in every
    residual block of stages 1 to 3 (``layerN.M.ce``), none in stage 4. With CE switched off everywhere it is mmdet's
    ResNet, names and numbers included.

    Training and evaluation. ``frozen_stages`` freezes CE together with its stage, and the stem's with the stem.
    ``norm_eval=True``, mmdet's default, puts CE in evaluation together with the norms: its running statistics are used
    and left alone, so they must come from a checkpoint. Unset statistics in use are reported once, by layer name.

    Paper: `Channel Equilibrium Networks for Learning Deep Representation <https://arxiv.org/abs/2003.00214>`_.

    Args:
        depth: 18, 34, 50, 101 or 152.
        ce_cfg: Arguments of each ChannelEquilibrium. None switches CE off everywhere.
        stage_with_ce: For each stage, whether its blocks have CE. Defaults to the first three stages.
        stem_with_ce: Whether the stem has CE.
        stem_ce_cfg: What the stem's CE has different from ``ce_cfg``.
        ce_eval: Whether CE stays in evaluation while the network trains. None follows ``norm_eval``; False lets CE use
            and update the batch's statistics beside a frozen norm. Frozen stages stay in evaluation in any case.
        zero_init_residual: Whether to zero the last norm of each block where weights are initialized at random. None
            zeroes it in blocks without CE only, as the released network has it: CE is invariant to its input's scale
            in one branch, so a small gamma before it does not make a small residual.
        **kwargs: See mmdet's ResNet.

    Raises:
        KeyError: If ``depth`` is none of the above.
        ValueError: If ``stage_with_ce`` does not have one value for each stage, or a CE argument is out of range.

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

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: Optional[int] = None,
        base_channels: int = 64,
        num_stages: int = 4,
        *args: Any,
        ce_cfg: Optional[dict] = dict(num_channels=16),
        stage_with_ce: Optional[Sequence[bool]] = None,
        stem_with_ce: bool = True,
        stem_ce_cfg: Optional[dict] = dict(num_channels=64),
        ce_eval: Optional[bool] = None,
        zero_init_residual: Optional[bool] = None,
        **kwargs: Any,
    ) -> None:
        if depth not in self.arch_settings:
            raise KeyError(f'invalid depth {depth} for {type(self).__name__}; expected one of {[*self.arch_settings]}')
        if stage_with_ce is None:
            stage_with_ce = (True, True, True, False)[:num_stages]
        if len(stage_with_ce) != num_stages:
            raise ValueError(
                f'stage_with_ce needs one value for each of the {num_stages} stages, got {len(stage_with_ce)}: '
                f'{tuple(stage_with_ce)}'
            )
        # Set before ResNet's constructor, which calls the methods below.
        self.ce_cfg = ce_cfg
        self.stage_with_ce = tuple(stage_with_ce) if ce_cfg is not None else (False,) * num_stages
        self.stem_ce_cfg = {**ce_cfg, **(stem_ce_cfg or {})} if ce_cfg is not None and stem_with_ce else None
        self.ce_eval = ce_eval
        self._random_init = kwargs.get('init_cfg') is None and kwargs.get('pretrained') is None
        self._statistics_checked = False
        self._reported: set[str] = set()
        super().__init__(
            depth,
            in_channels,
            stem_channels,
            base_channels,
            num_stages,
            *args,
            zero_init_residual=zero_init_residual,
            **kwargs,
        )

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Pack all blocks of the next stage, with or without CE, into a ``ResLayer``."""
        ce = self.ce_cfg if self.stage_with_ce[len(self.res_layers)] else None
        zero_init = ce is None if self.zero_init_residual is None else self.zero_init_residual
        if self._random_init and zero_init:
            # ResNet does this for its own block classes only.
            last_norm = 'norm3' if issubclass(self.block, Bottleneck) else 'norm2'
            kwargs['init_cfg'] = dict(type='Constant', val=0, override=dict(name=last_norm))
        return super().make_res_layer(ce=ce, **kwargs)

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        super()._make_stem_layer(in_channels, stem_channels)
        self.ce1 = None if self.stem_ce_cfg is None else build_ce(self.stem_ce_cfg, stem_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of ``out_indices`` for images (N, 3, H, W)."""
        if not self._statistics_checked and not torch.compiler.is_compiling():
            self._check_statistics()
        if not self.deep_stem:
            x = self.relu(norm_ce(self.norm1, self.ce1, self.conv1(x)))
        elif self.ce1 is None:
            x = self.stem(x)
        else:
            *layers, norm, relu = self.stem
            for layer in layers:
                x = layer(x)
            x = relu(norm_ce(norm, self.ce1, x))
        x = self.maxpool(x)
        outs = []
        for i, layer_name in enumerate(self.res_layers):
            x = getattr(self, layer_name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> CEResNet:
        """Set the mode, while frozen stages, and norms and CE that are told so, stay in evaluation."""
        super().train(mode)
        self._statistics_checked = False
        if mode and (self.norm_eval if self.ce_eval is None else self.ce_eval):
            for _, ce in self.named_ce():
                ce.eval()
        return self

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        if self.frozen_stages >= 0 and self.ce1 is not None:
            self.ce1.eval()
            self.ce1.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialize the weights; name the way to pretrained ones that are not there."""
        for cfg in self.init_cfg if isinstance(self.init_cfg, (list, tuple)) else [self.init_cfg or {}]:
            path = str(cfg.get('checkpoint') or '')
            if path and '://' not in path and not Path(path).is_file():
                raise FileNotFoundError(missing_weights_message(path))
        super().init_weights()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Here every way of loading passes: torch's, and mmengine's, which does not call load_state_dict.
        print_log(summarize_load(self, state_dict, prefix), logger='current')
        super()._load_from_state_dict(state_dict, prefix, *args)

    def named_ce(self) -> Iterator[tuple[str, ChannelEquilibrium]]:
        """Iterate over the backbone's CE layers and their names."""
        return ((name, m) for name, m in self.named_modules() if isinstance(m, ChannelEquilibrium))

    def _check_statistics(self) -> None:
        """Warn, once for each layer, if a CE is evaluated with statistics that no data ever updated."""
        self._statistics_checked = True
        unset = [
            name
            for name, ce in self.named_ce()
            if not ce.training and name not in self._reported and ce.lacks_statistics and not ce.is_identity
        ]
        if unset:
            self._reported.update(unset)
            warnings.warn(
                f'{len(unset)} CE layers are in evaluation with statistics that no data ever updated: '
                f'{", ".join(unset)}. Load a checkpoint trained with CE (init_cfg or load_from), or let CE see data: '
                'train with norm_eval=False, or ce_eval=False beside a frozen norm, and with no frozen stage that has '
                'such a layer (frozen_stages=-1).',
                stacklevel=2,
            )
