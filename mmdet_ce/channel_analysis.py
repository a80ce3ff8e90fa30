"""Measure what each channel of a backbone contributes, with Channel Equilibrium or without.

A layer is a norm together with the CE that follows it, named after the norm, so that a plain network and one with CE
pair up by name. Its response is the positive part of what it puts out, what a ReLU lets through, before a shortcut is
added; a channel's contribution is its mean response over images and positions. Norms of shortcuts, which no ReLU
follows, are left out. ``output.0``, ``output.1``, ... are the feature maps that the backbone hands on, shortcuts added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional, Union

import torch
from mmcv.cnn import is_norm
from torch import Tensor, nn

from .layers import ChannelEquilibrium

# A channel under this share of its layer's mean contribution is inhibited. CE changes the scale of a layer, and the
# next norm undoes it, so networks are compared by the relative threshold.
RELATIVE_THRESHOLD = 0.05
ABSOLUTE_THRESHOLD = 0.01


def inhibited_share(contribution: Tensor, threshold: float) -> float:
    """Return the share of channels whose contribution, (C,), is at most ``threshold``."""
    return (contribution <= threshold).double().mean().item()


def normalized_entropy(contribution: Tensor) -> float:
    """Return how equally the channels share a layer's response: their entropy over that of equal channels.

    Args:
        contribution: (C,), not negative.

    Returns:
        1 where all channels contribute the same, 0 where only one does or none.
    """
    total = contribution.double().sum()
    if total == 0 or len(contribution) == 1:
        return 0.0
    return torch.special.entr(contribution.double() / total).sum().item() / math.log(len(contribution))


def off_diagonal_energy(covariance: Tensor) -> float:
    """Return the share of a covariance's squared entries that lies off its diagonal.

    Args:
        covariance: (G, d, d), of the channel groups.

    Returns:
        The mean over the groups: 0 for uncorrelated channels, (d - 1) / d where all are the same.
    """
    energy = covariance.square().sum((1, 2))
    off_diagonal = energy - covariance.diagonal(dim1=1, dim2=2).square().sum(1)
    return (off_diagonal / energy.clamp(min=torch.finfo(energy.dtype).tiny)).mean().item()


@dataclass
class CEStatistics:
    """What a CE layer has learned and does to its input."""

    lam: float  # lambda, the share of batch decorrelation
    alpha: Optional[float]  # the share of CE in a block with identity start
    gate: Tensor  # (images, C), of instance reweighting
    contribution_before: Tensor  # (C,), were there no CE: of the norm alone
    off_diagonal_before: float
    off_diagonal_after: float


@dataclass
class LayerStatistics:
    """What was measured of one layer."""

    contribution: Tensor  # (C,)
    gamma: Optional[Tensor]  # (C,), |weight| of the norm; None where there is none
    ce: Optional[CEStatistics] = None

    def before_ce(self) -> LayerStatistics:
        """Return the layer as its norm alone makes it; the same where there is no CE."""
        return self if self.ce is None else LayerStatistics(self.ce.contribution_before, self.gamma)

    def measures(
        self, relative_threshold: float = RELATIVE_THRESHOLD, absolute_threshold: float = ABSOLUTE_THRESHOLD
    ) -> dict[str, float]:
        """Return the layer in numbers, by name: a row of a table."""
        row = dict(
            channels=len(self.contribution),
            inhibited_relative=inhibited_share(self.contribution, relative_threshold * self.contribution.mean().item()),
            inhibited_absolute=inhibited_share(self.contribution, absolute_threshold),
            entropy=normalized_entropy(self.contribution),
        )
        if self.ce is not None:
            row['lambda'] = self.ce.lam
            if self.ce.alpha is not None:
                row['alpha'] = self.ce.alpha
            quantiles = self.ce.gate.flatten().sort().values
            for percent in (5, 50, 95):
                row[f'gate_{percent}'] = quantiles[round(percent / 100 * (len(quantiles) - 1))].item()
            before = self.before_ce().measures(relative_threshold, absolute_threshold)
            for key in ('inhibited_relative', 'inhibited_absolute', 'entropy'):
                row[f'{key}_before'] = before[key]
            row['off_diagonal_before'] = self.ce.off_diagonal_before
            row['off_diagonal_after'] = self.ce.off_diagonal_after
        return row


class _Covariance:
    """The covariance of channel groups over images and positions, summed up in float64."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.count = 0
        self.center: Optional[Tensor] = None

    def add(self, x: Tensor) -> None:
        flat = x.float().transpose(0, 1).reshape(-1, self.group_size, x.numel() // x.shape[1])  # (G, d, N L)
        if self.center is None:
            # About the first batch's mean: sums about zero would lose the variance of a channel far from it.
            self.center = flat.mean(2, keepdim=True)
            self.sum = self.products = 0.0
        flat = flat - self.center
        self.count += flat.shape[2]
        self.sum = self.sum + flat.sum(2).double()
        self.products = self.products + (flat @ flat.transpose(1, 2)).double()

    def value(self) -> Tensor:
        mean = self.sum / self.count
        return self.products / self.count - mean[:, :, None] * mean[:, None, :]


class _CERecord:
    """What is collected of one CE layer."""

    def __init__(self, ce: ChannelEquilibrium) -> None:
        self.ce = ce
        self.gates: list[Tensor] = []
        self.total_before: Union[Tensor, float] = 0.0
        self.before, self.after = _Covariance(ce.group_size), _Covariance(ce.group_size)

    def add(self, x: Tensor, out: Tensor) -> None:
        ir = self.ce.ir
        variance = (x - x.mean((2, 3), keepdim=True)).square().sum((2, 3)) / max(x[0, 0].numel() - 1, 1)
        self.gates.append(ir.gate(variance).cpu())
        self.total_before += _contribution(x)
        self.before.add(x)
        self.after.add(out)

    def statistics(self) -> CEStatistics:
        return CEStatistics(
            lam=torch.sigmoid(self.ce.theta).item(),
            alpha=None if self.ce.alpha is None else self.ce.alpha.item(),
            gate=torch.cat(self.gates),
            contribution_before=self.total_before.cpu() / sum(map(len, self.gates)),
            off_diagonal_before=off_diagonal_energy(self.before.value()),
            off_diagonal_after=off_diagonal_energy(self.after.value()),
        )


class _Collector:
    """Forward hooks on the norms and CE layers of a backbone, and what they have seen."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}  # contributions summed over the images, by layer in order of execution
        self.ce: dict[str, _CERecord] = {}
        self._current: dict[str, Tensor] = {}  # of the images in the present pass
        self._last: tuple[str, Optional[Tensor]] = ('', None)

    def after_norm(self, name: str, norm: nn.Module, args: tuple, out: Tensor) -> None:
        if out.dim() == 4:
            self.record(name, out)
            self._last = name, out

    def after_ce(self, name: str, ce: ChannelEquilibrium, args: tuple, out: Tensor) -> None:
        norm_name, norm_out = self._last
        name = norm_name if args[0] is norm_out else name
        self.record(name, out)  # in place of the norm's own
        self.ce.setdefault(name, _CERecord(ce)).add(args[0], out)

    def record(self, name: str, out: Tensor) -> None:
        self._current[name] = _contribution(out)

    def end_pass(self, outputs: Any) -> None:
        if not self._current:
            raise ValueError('the backbone has no norm over (N, C, H, W) to measure')
        for index, out in enumerate(outputs if isinstance(outputs, (tuple, list)) else [outputs]):
            self.record(f'output.{index}', out)
        for name, total in self._current.items():
            self.totals[name] = self.totals.get(name, 0) + total
        self._current, self._last = {}, ('', None)


def _contribution(x: Tensor) -> Tensor:
    """Return the contributions of the channels of (N, C, H, W), summed over the images: (C,)."""
    return x.relu().mean((2, 3)).double().sum(0)


@torch.no_grad()
def analyze_channels(backbone: nn.Module, batches: Iterable[Tensor]) -> dict[str, LayerStatistics]:
    """Run images through a backbone in evaluation and measure its channels.

    Neither weights nor statistics nor the random state change, and the modes of all modules are as before afterwards.

    Args:
        backbone: Any backbone of mmdet that has norms over (N, C, H, W).
        batches: Image tensors, (N, 3, H, W), as the network sees them. Padding counts as image.

    Returns:
        The layers by name, in the order in which they run.

    Raises:
        ValueError: If there is no image, or no norm to measure.
    """
    collector, count = _Collector(), 0
    modules = dict(backbone.named_modules())
    modes = {m: m.training for m in modules.values()}
    with ExitStack() as stack:
        for m, training in modes.items():
            stack.callback(setattr, m, 'training', training)
        backbone.eval()
        for name, m in modules.items():
            if isinstance(m, ChannelEquilibrium):
                hook = partial(collector.after_ce, name)
            elif is_norm(m) and 'downsample' not in name.split('.'):
                hook = partial(collector.after_norm, name)
            else:
                continue
            stack.callback(m.register_forward_hook(hook).remove)
        for images in batches:
            collector.end_pass(backbone(images))
            count += len(images)
    if not count:
        raise ValueError('no image to measure with')
    layers = {}
    for name, total in collector.totals.items():
        gamma = getattr(modules.get(name), 'weight', None)
        layers[name] = LayerStatistics(
            contribution=total.cpu() / count,
            gamma=None if gamma is None else gamma.abs().double().cpu(),
            ce=collector.ce[name].statistics() if name in collector.ce else None,
        )
    return layers


def network_input(batch: Mapping[str, Any], data_preprocessor: Optional[nn.Module]) -> Tensor:
    """Return the images of a data loader's batch as the network sees them in a test, (N, 3, H, W)."""
    inputs = batch['inputs']
    if data_preprocessor is None:
        return inputs
    return data_preprocessor(dict(inputs=inputs), False)['inputs']
