"""Measure what each channel of a backbone contributes, with Channel Equilibrium or without.

A layer is a norm together with the CE that follows it, named after the norm, so that a plain network and one with CE
pair up by name. Its response is the positive part of what it puts out, what a ReLU lets through, before a shortcut is
added; a channel's contribution is its mean response over images and positions. Norms of shortcuts, which no ReLU
follows, are left out. Sums over the images are NumPy's, in float64, which some devices do not support.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Optional

import numpy as np
import torch
from mmcv.cnn import is_norm
from torch import Tensor, nn

from .layers import ChannelEquilibrium

# CE changes the scale of a layer, and the next norm undoes it. So what counts is the share of the layer's mean.
INHIBITED_BELOW = 0.05


def inhibited_share(contribution: np.ndarray, threshold: float = INHIBITED_BELOW) -> float:
    """Return the share of channels whose contribution, (C,), is at most ``threshold`` of the layer's mean."""
    return float((contribution <= threshold * contribution.mean()).mean())


def normalized_entropy(contribution: np.ndarray) -> float:
    """Return the entropy of contributions, (C,), over that of equal ones: 1 where all are equal, 0 for one alone."""
    total = contribution.sum()
    if total == 0 or len(contribution) == 1:
        return 0.0
    share = contribution[contribution != 0] / total
    return float(-(share * np.log(share)).sum() / math.log(len(contribution)))


def off_diagonal_energy(covariance: np.ndarray) -> float:
    """Return the share of squared covariances, (G, d, d), off the diagonal: (d - 1) / d if all channels are equal."""
    energy = np.square(covariance).sum((1, 2))
    off_diagonal = energy - np.square(np.diagonal(covariance, axis1=1, axis2=2)).sum(1)
    return float((off_diagonal / np.maximum(energy, np.finfo(energy.dtype).tiny)).mean())


@dataclass
class LayerStatistics:
    """What was measured of one layer."""

    contribution: np.ndarray  # (C,)
    before_ce: Optional[np.ndarray] = None  # (C,), the contribution of the norm alone, where CE follows it
    ce: Optional[dict[str, float]] = None  # what CE has learned and does to its input

    def measures(self, threshold: float = INHIBITED_BELOW) -> dict[str, float]:
        """Return the layer in numbers, by name.

        With CE there are ``inhibited_before`` and ``entropy_before`` CE, ``lambda``, ``alpha`` (with identity start),
        percentiles of the gate over images and channels, ``gate_5``, ``gate_50`` and ``gate_95``, and the off-diagonal
        energy of the covariance, ``off_diagonal_before`` and ``off_diagonal_after`` CE.
        """
        row = dict(
            channels=len(self.contribution),
            inhibited=inhibited_share(self.contribution, threshold),
            entropy=normalized_entropy(self.contribution),
        )
        if self.ce is not None:
            row['inhibited_before'] = inhibited_share(self.before_ce, threshold)
            row['entropy_before'] = normalized_entropy(self.before_ce)
            row.update(self.ce)
        return row


@torch.no_grad()
def analyze_channels(backbone: nn.Module, batches: Iterable[Tensor]) -> dict[str, LayerStatistics]:
    """Run images through a backbone in evaluation and measure its channels.

    Neither weights nor statistics change, and the modes of all modules are as before afterwards.

    Args:
        backbone: Any backbone of mmdet that has norms over (N, C, H, W).
        batches: Image tensors, (N, 3, H, W), as the network sees them. Padding counts as image.

    Returns:
        The layers by name, in the order in which they run.
    """
    collector, count = _Collector(), 0
    modes = [(m, m.training) for m in backbone.modules()]
    with ExitStack() as stack:
        for m, training in modes:
            stack.callback(setattr, m, 'training', training)
        backbone.eval()
        for name, m in backbone.named_modules():
            if isinstance(m, ChannelEquilibrium):
                stack.enter_context(m.register_forward_hook(partial(collector.after_ce, name)))
            elif is_norm(m) and 'downsample' not in name.split('.'):
                stack.enter_context(m.register_forward_hook(partial(collector.after_norm, name)))
        for images in batches:
            backbone(images)
            count += len(images)
    if not collector.totals:
        raise ValueError('nothing to measure: there is no image, or the backbone has no norm over (N, C, H, W)')
    return {
        name: collector.ce[name].statistics(count) if name in collector.ce else LayerStatistics(total / count)
        for name, total in collector.totals.items()
    }


class _Collector:
    """What the forward hooks on a backbone's norms and CE layers have seen."""

    def __init__(self) -> None:
        self.totals: dict[str, np.ndarray] = {}  # contributions of the norms, summed over the images
        self.ce: dict[str, _CESums] = {}
        self.last: tuple[str, Optional[Tensor]] = ('', None)

    def after_norm(self, name: str, norm: nn.Module, args: tuple, out: Tensor) -> None:
        if out.dim() == 4:
            self.totals[name] = self.totals.get(name, 0.0) + _contribution(out)
            self.last = name, out

    def after_ce(self, name: str, ce: ChannelEquilibrium, args: tuple, out: Tensor) -> None:
        name = self.last[0] if args[0] is self.last[1] else name
        self.totals.setdefault(name, 0.0)
        self.ce.setdefault(name, _CESums(ce)).add(args[0], out)


class _CESums:
    """What is summed up of one CE layer."""

    def __init__(self, ce: ChannelEquilibrium) -> None:
        self.ce = ce
        self.gates: list[np.ndarray] = []
        self.contribution_before = self.contribution_after = 0.0
        self.before, self.after = _Covariance(ce.group_size), _Covariance(ce.group_size)

    def add(self, x: Tensor, out: Tensor) -> None:
        deviation = x.float() - x.float().mean((2, 3), keepdim=True)
        variance = deviation.square().sum((2, 3)) / max(x[0, 0].numel() - 1, 1)
        ir = self.ce.ir
        self.gates.append(_numpy(ir.fc2(ir.norm(ir.fc1(variance.to(x.dtype))).relu()).sigmoid()))
        self.contribution_before = self.contribution_before + _contribution(x)
        self.contribution_after = self.contribution_after + _contribution(out)
        self.before.add(x)
        self.after.add(out)

    def statistics(self, count: int) -> LayerStatistics:
        ce = {'lambda': torch.sigmoid(self.ce.theta).item()}
        if self.ce.alpha is not None:
            ce['alpha'] = self.ce.alpha.item()
        for percent in (5, 50, 95):
            ce[f'gate_{percent}'] = float(np.percentile(np.concatenate(self.gates), percent))
        ce['off_diagonal_before'] = off_diagonal_energy(self.before.value())
        ce['off_diagonal_after'] = off_diagonal_energy(self.after.value())
        return LayerStatistics(self.contribution_after / count, self.contribution_before / count, ce)


class _Covariance:
    """The covariance of channel groups over images and positions."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.count, self.sum, self.products = 0, 0.0, 0.0
        self.center: Optional[Tensor] = None

    def add(self, x: Tensor) -> None:
        flat = x.float().transpose(0, 1).reshape(-1, self.group_size, x.numel() // x.shape[1])  # (G, d, N L)
        if self.center is None:
            # About the first batch's mean: sums about zero would lose the variance of a channel far from it.
            self.center = flat.mean(2, keepdim=True)
        flat = flat - self.center
        self.count += flat.shape[2]
        self.sum = self.sum + _numpy(flat.sum(2))
        self.products = self.products + _numpy(flat @ flat.transpose(1, 2))

    def value(self) -> np.ndarray:
        mean = self.sum / self.count
        return self.products / self.count - mean[:, :, None] * mean[:, None, :]


def _contribution(x: Tensor) -> np.ndarray:
    """Return the contributions of the channels of (N, C, H, W), summed over the images: (C,)."""
    return _numpy(x.relu().mean((2, 3))).sum(0)


def _numpy(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy().astype(np.float64)
