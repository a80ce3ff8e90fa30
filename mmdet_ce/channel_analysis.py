"""Measure what each channel of a network contributes, with Channel Equilibrium or without.

A layer is a norm together with the CE that follows it, named after the norm, so that a plain network and one with CE
pair up by name. Its response is the positive part of what it puts out, what a ReLU lets through, before a shortcut is
added. A channel's contribution is its mean response over images and positions. Norms of shortcuts, which no ReLU
follows, are left out. Sums are float64 on the CPU, since some devices do not support float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Optional

import torch
from mmcv.cnn import is_norm
from torch import Tensor, nn

from .layers import ChannelEquilibrium

# CE changes the scale of a layer, and the next norm undoes it. So what counts is the share of the layer's mean.
INHIBITED_BELOW = 0.05


def inhibited_share(contribution: Tensor, threshold: float = INHIBITED_BELOW) -> float:
    """Return the share of channels whose contribution, (C,), is at most ``threshold`` of the layer's mean."""
    return (contribution <= threshold * contribution.mean()).double().mean().item()


def off_diagonal_energy(covariance: Tensor) -> float:
    """Return the share of squared covariances, (G, d, d), off the diagonal: (d - 1) / d if all channels are equal."""
    energy = covariance.square().sum((1, 2))
    diagonal = covariance.diagonal(dim1=1, dim2=2).square().sum(1)
    return ((energy - diagonal) / energy.clamp_min(torch.finfo(energy.dtype).tiny)).mean().item()


class LayerStatistics:
    """What was measured of one layer."""

    def __init__(self) -> None:
        self.norm_output = MapSums()
        self.ce: Optional[ChannelEquilibrium] = None
        self.ce_input: Optional[MapSums] = None
        self.ce_output: Optional[MapSums] = None

    @property
    def contribution(self) -> Tensor:
        """The mean response of each channel of the layer's output, (C,)."""
        return (self.norm_output if self.ce is None else self.ce_output).contribution

    def measures(self, threshold: float = INHIBITED_BELOW) -> dict[str, float]:
        """Return the layer in numbers, by name.

        With CE there are ``inhibited_before`` CE, ``lambda``, ``alpha`` (with ``identity_start``), and the off-diagonal
        energy of the covariance of channel groups, ``off_diagonal_before`` and ``off_diagonal_after`` CE.
        """
        row = dict(channels=len(self.contribution), inhibited=inhibited_share(self.contribution, threshold))
        if self.ce is not None:
            row['inhibited_before'] = inhibited_share(self.ce_input.contribution, threshold)
            row['off_diagonal_before'] = off_diagonal_energy(self.ce_input.covariance)
            row['off_diagonal_after'] = off_diagonal_energy(self.ce_output.covariance)
            row['lambda'] = torch.sigmoid(self.ce.theta).item()
            if self.ce.alpha is not None:
                row['alpha'] = self.ce.alpha.item()
        return row


class MapSums:
    """Sums over maps, (N, C, H, W): of the response of each channel and, on request, of products in channel groups."""

    def __init__(self, group_size: Optional[int] = None) -> None:
        self.group_size = group_size
        self.responses = 0.0
        self.num_images = 0
        self.center: Optional[Tensor] = None
        self.sums = 0.0
        self.products = 0.0
        self.num_positions = 0

    def add(self, x: Tensor) -> None:
        """Add a batch of maps."""
        self.responses = self.responses + _double(x.float().relu().mean((2, 3)).sum(0))
        self.num_images += len(x)
        if self.group_size is None:
            return
        flat = x.float().transpose(0, 1).reshape(-1, self.group_size, x.numel() // x.shape[1])  # (G, d, N L)
        if self.center is None:
            # About the first batch's mean: sums about zero would lose the variance of a channel far from it.
            self.center = flat.mean(2, keepdim=True)
        flat = flat - self.center
        self.sums = self.sums + _double(flat.sum(2))
        self.products = self.products + _double(flat @ flat.mT)
        self.num_positions += flat.shape[2]

    @property
    def contribution(self) -> Tensor:
        """The mean response of each channel, (C,)."""
        return self.responses / self.num_images

    @property
    def covariance(self) -> Tensor:
        """The covariance of each channel group over images and positions, (G, d, d)."""
        mean = self.sums / self.num_positions
        return self.products / self.num_positions - mean[:, :, None] * mean[:, None, :]


@contextmanager
def watch_channels(network: nn.Module) -> Iterator[dict[str, LayerStatistics]]:
    """Measure the layers of a network, while it runs, by forward hooks on its norms and CE layers.

    Weights and statistics stay as they are. Padding counts as image.

    Args:
        network: A backbone or a detector of mmdet, in any mode. Norms over (N, C, H, W) are measured.

    Yields:
        The layers by name, in the order in which they first run; each forward pass adds to them.

    Example:
        >>> with watch_channels(detector) as layers:
        ...     detector.test_step(batch)
        >>> layers['backbone.bn1'].measures()['inhibited']
    """
    watch = _Watch()
    with ExitStack() as stack:
        for name, m in network.named_modules():
            if isinstance(m, ChannelEquilibrium):
                stack.callback(m.register_forward_hook(partial(watch.after_ce, name)).remove)
            elif is_norm(m) and 'downsample' not in name.split('.'):
                stack.callback(m.register_forward_hook(partial(watch.after_norm, name)).remove)
        yield watch.layers


class _Watch:
    """What the forward hooks on a network's norms and CE layers have seen."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerStatistics] = {}
        self.last_norm = ''
        self.last_output: Optional[Tensor] = None

    @torch.no_grad()
    def after_norm(self, name: str, norm: nn.Module, args: tuple, out: Tensor) -> None:
        if out.dim() == 4 and len(out):
            self.layers.setdefault(name, LayerStatistics()).norm_output.add(out)
            self.last_norm = name
            self.last_output = out

    @torch.no_grad()
    def after_ce(self, name: str, ce: ChannelEquilibrium, args: tuple, out: Tensor) -> None:
        x = args[0]
        if not len(x):
            return
        layer = self.layers.setdefault(self.last_norm if x is self.last_output else name, LayerStatistics())
        if layer.ce is None:
            layer.ce = ce
            layer.ce_input = MapSums(ce.group_size)
            layer.ce_output = MapSums(ce.group_size)
        layer.ce_input.add(x)
        layer.ce_output.add(out)


def _double(x: Tensor) -> Tensor:
    return x.cpu().double()
