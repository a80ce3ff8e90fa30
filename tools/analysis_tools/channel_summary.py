"""The channels of several models in numbers: a row for each model and group of layers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Dict, Optional

import numpy as np
import torch
from torch import Tensor

from mmdet_ce.channel_analysis import LayerStatistics, inhibited_share, normalized_entropy

GROUPS = dict(ce='where CE sits', before='there, before CE', other='elsewhere', output='outputs')  # of layers
Models = Dict[str, Dict[str, LayerStatistics]]


def relative(layer: LayerStatistics) -> Tensor:
    """Return the contributions of a layer's channels over their mean."""
    return layer.contribution / layer.contribution.mean().clamp(min=torch.finfo(torch.float64).tiny)


def low_gamma_contribution(layers: Sequence[LayerStatistics]) -> Optional[float]:
    """Return the mean relative contribution of the quarter of each layer's channels whose |gamma| is smallest."""
    values = [
        relative(layer)[layer.gamma.argsort()[: max(len(layer.gamma) // 4, 1)]]
        for layer in layers
        if layer.gamma is not None
    ]
    return torch.cat(values).mean().item() if values else None


def summarize(layers: Sequence[LayerStatistics], args: argparse.Namespace) -> dict[str, Any]:
    """Return a group of layers in numbers: shares over all their channels, means over the layers."""
    contribution = torch.cat([layer.contribution for layer in layers])
    return dict(
        layers=len(layers),
        channels=len(contribution),
        inhibited_relative=inhibited_share(torch.cat([relative(layer) for layer in layers]), args.relative_threshold),
        inhibited_absolute=inhibited_share(contribution, args.absolute_threshold),
        entropy=np.mean([normalized_entropy(layer.contribution) for layer in layers]).item(),
        low_gamma_contribution=low_gamma_contribution(layers),
    )


def groups_of(models: Models) -> dict[str, list[str]]:
    """Return the layers that all models have: those that have CE in some model, those that never do, the outputs."""
    common = [name for name in next(iter(models.values())) if all(name in layers for layers in models.values())]
    groups = {group: [] for group in GROUPS}
    for name in common:
        has_ce = any(layers[name].ce is not None for layers in models.values())
        groups['output' if name.startswith('output.') else 'ce' if has_ce else 'other'].append(name)
    return {group: names for group, names in groups.items() if names}


def summarize_all(models: Models, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each model and group of layers; of layers with CE one more, for what their norms alone make."""
    rows = []
    for group, names in groups_of(models).items():
        for model, layers in models.items():
            chosen = [layers[name] for name in names]
            ce = [layer.ce for layer in chosen if layer.ce is not None]
            if ce:
                before = [layer.before_ce() for layer in chosen]
                rows.append(dict(model=model, group='before', **summarize(before, args)))
            row = dict(model=model, group=group, **summarize(chosen, args))
            if ce:
                row['lambda'] = np.mean([c.lam for c in ce]).item()
                row['off_diagonal_before'] = np.mean([c.off_diagonal_before for c in ce]).item()
                row['off_diagonal_after'] = np.mean([c.off_diagonal_after for c in ce]).item()
            rows.append(row)
    return rows


def bottom_line(summary: list[dict[str, Any]]) -> str:
    """Say in words what the numbers are, a line for each group of layers."""
    lines = []
    for group in dict.fromkeys(row['group'] for row in summary):
        shares = [f'{row["model"]} {row["inhibited_relative"]:.1%}' for row in summary if row['group'] == group]
        lines.append(f'inhibited channels, {GROUPS[group]}: {"; ".join(shares)}')
    return '\n'.join(lines)
