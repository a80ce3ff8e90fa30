"""What tools/benchmark_ce.py compares CE with: its released form, the plain network, and other blocks in that.

A config for tools/train.py finds RivalResNet with ``custom_imports=dict(imports=['mmdet_ce', 'benchmark.models'])``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import ContextBlock
from mmdet.models import ResNet
from mmdet.models.backbones.resnet import Bottleneck
from mmdet.models.layers import SELayer
from mmdet.registry import MODELS
from torch import Tensor, nn

from mmdet_ce import CEResNet, ChannelEquilibrium


class ReleasedForm(nn.Module):
    """CE computed pass by pass, as the released code does: its order of passes, copies and saved tensors.

    The same parameters and statistics as ``ce``, and the same output; a yardstick, not a layer.
    """

    def __init__(self, ce: ChannelEquilibrium) -> None:
        super().__init__()
        self.ce = ce

    def forward(self, x: Tensor) -> Tensor:
        """Apply CE to ``x``, (N, C, H, W)."""
        ce, (n, c, h, w) = self.ce, x.shape
        variance = x.reshape(n, c, -1).var(dim=-1)
        gate = torch.sigmoid(ce.ir.fc2(F.relu(ce.ir.norm(ce.ir.fc1(variance)))))
        # Copied twice, for the statistics (a pooling, switched off, is in between) and for the product.
        pooled = x.transpose(0, 1).contiguous().view(ce.num_groups, ce.group_size, -1)
        grouped = x.transpose(0, 1).contiguous().view(ce.num_groups, ce.group_size, -1)
        if ce.training:
            scale = variance.mean().sqrt()
            mean = pooled.mean(-1, keepdim=True)
            centered = pooled - mean
            eye = torch.eye(ce.group_size, dtype=x.dtype, device=x.device).expand(ce.num_groups, -1, -1)
            sigma = torch.baddbmm(eye, centered, centered.transpose(1, 2), beta=ce.bd.eps, alpha=1 / centered.shape[2])
            sigma_n = sigma / (sigma * eye).sum((1, 2), keepdim=True)
            whitening = eye
            for _ in range(ce.bd.num_iterations):
                whitening = torch.baddbmm(whitening, whitening @ whitening @ whitening, sigma_n, beta=1.5, alpha=-0.5)
            ce._update(mean, whitening, scale)
        else:
            grouped - ce.bd.running_mean  # computed, never used
            scale, whitening = ce.ir.running_scale, ce.bd.running_whitening
        reweighted = (gate / scale)[:, :, None, None].expand_as(x) * x
        decorrelated = (whitening @ grouped).reshape(c, n, h, w).transpose(0, 1).contiguous()
        lam = torch.sigmoid(ce.theta)
        return lam * decorrelated + (1 - lam) * reweighted


def with_released_form(backbone: CEResNet) -> CEResNet:
    """Return a copy of ``backbone`` whose CE layers compute as the released code does."""
    backbone = copy.deepcopy(backbone)
    for name, ce in list(backbone.named_ce()):
        parent, _, own_name = name.rpartition('.')
        setattr(backbone.get_submodule(parent), own_name, ReleasedForm(ce))
    return backbone


@MODELS.register_module()
class RivalResNet(ResNet):
    """mmdet's ResNet with another block after the last norm of its residual blocks, where CE would be.

    Args:
        depth: See mmdet's ResNet.
        rival: 'gc' for mmcv's ContextBlock in stages 2 to 4, with the lighter ratio of mmdet's configs/gcnet, or 'se'
            for squeeze-and-excitation in all stages.
        **kwargs: See mmdet's ResNet. The last norms do not start at zero, as with CE.
    """

    def __init__(self, depth: int, rival: str, **kwargs: Any) -> None:
        super().__init__(depth, zero_init_residual=False, **kwargs)
        for layer in self.res_layers[rival == 'gc' :]:
            for block in getattr(self, layer):
                name = block.norm3_name if isinstance(block, Bottleneck) else block.norm2_name
                norm = getattr(block, name)
                channels = norm.num_features
                added = ContextBlock(channels, ratio=1 / 16) if rival == 'gc' else SELayer(channels)
                setattr(block, name, nn.Sequential(norm, added))
