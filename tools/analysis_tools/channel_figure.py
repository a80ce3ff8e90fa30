"""The figure of analyze_channels.py: the models overlaid."""

from __future__ import annotations

import argparse
import textwrap

import numpy as np
import torch
from channel_summary import GROUPS, Models, groups_of, relative
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmdet_ce.channel_analysis import LayerStatistics

COLOURS = ['#d55e00', '#0072b2', '#009e73', '#cc79a7']  # told apart with any kind of colour vision (Okabe and Ito)
MARKERS = 'osD^'
FLOOR = 1e-3  # of the logarithmic axes of contribution; what is lower is drawn there


def draw(models: Models, lines: str, args: argparse.Namespace) -> None:
    """Draw channels.png, the models overlaid."""
    groups = groups_of(models)
    matters = groups.get('ce') or groups['other']
    with_ce = {name: layers for name, layers in models.items() if any(layer.ce for layer in layers.values())}
    mosaic = [['inhibited', 'sorted'], ['entropy', 'gamma'], *([['learned', 'off_diagonal']] if with_ce else [])]
    size = (11 + 0.1 * sum(map(len, groups.values())), 3.7 * len(mosaic) + 0.6)
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplot_mosaic(mosaic)
    styles = {
        name: dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)]) for i, name in enumerate(models)
    }
    for name, layers in models.items():
        draw_layers(axes['inhibited'], axes['entropy'], layers, groups, name, styles[name], args.relative_threshold)
        draw_sorted(axes['sorted'], [layers[layer] for layer in matters], name, styles[name])
        draw_gamma(axes['gamma'], [layers[layer] for layer in matters], name, styles[name])
    for index, (name, layers) in enumerate(with_ce.items()):
        ce = {layer: layers[layer].ce for layer in layers if layers[layer].ce is not None}
        draw_learned(axes['learned'], ce, name, styles[name], index)
        draw_off_diagonal(axes['off_diagonal'], ce, name, styles[name], index)

    names = sum(groups.values(), [])
    axes['inhibited'].set_title(f"Channels under {args.relative_threshold:.0%} of their layer's mean contribution")
    axes['inhibited'].set(ylabel='inhibited channels (%)', ylim=(0, 1.15 * max(5, axes['inhibited'].get_ylim()[1])))
    axes['inhibited'].set_xticks(range(len(names)), [])
    start = 0
    for group, members in groups.items():
        place = (start + (len(members) - 1) / 2, 0.99)
        axes['inhibited'].annotate(GROUPS[group], place, xycoords=('data', 'axes fraction'), ha='center', va='top')
        start += len(members)
        if start < len(names):
            axes['inhibited'].axvline(start - 0.5, color='0.7', linewidth=1)
            axes['entropy'].axvline(start - 0.5, color='0.7', linewidth=1)
    axes['entropy'].set(title='How equally the channels contribute', ylabel='entropy (1: all the same)')
    axes['entropy'].set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes['sorted'].axhline(args.relative_threshold, color='0.4', linestyle=':')
    where = GROUPS['ce'] if 'ce' in groups else 'all layers'
    axes['sorted'].set(title=f'Contribution of the channels, {where}', xlabel='channels, from weakest to strongest (%)')
    axes['gamma'].set(title='... against gamma (lines: medians of tenths)', xscale='log')
    axes['gamma'].set_xlabel("|gamma| of the channel's norm / mean of the layer")
    for key in ('sorted', 'gamma'):
        axes[key].set(yscale='log', ylabel='contribution / mean of the layer')
    for key, axis in axes.items():
        if key != 'entropy':  # has the legend of the panel above it
            axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
    figure.suptitle(textwrap.fill(lines.splitlines()[0], 120), fontsize=11)
    figure.savefig(args.out_dir / 'channels.png', dpi=90)


def draw_layers(
    inhibited: Axes, entropy: Axes, layers: dict[str, LayerStatistics], groups: dict[str, list[str]], name: str,
    style: dict, threshold: float,
) -> None:  # fmt: skip
    """Draw one model's measures of each layer, joined within a group; dashed what the norm alone makes, before CE."""
    start, label = 0, name
    for names in groups.values():
        x = range(start, start + len(names))
        start += len(names)
        chosen = [layers[layer] for layer in names]
        if any(layer.ce for layer in chosen):
            before = [layer.before_ce().measures(threshold) for layer in chosen]
            dashed = dict(color=style['color'], linestyle='--', alpha=0.7, label=f'{name}, before CE')
            inhibited.plot(x, [100 * row['inhibited_relative'] for row in before], **dashed)
            entropy.plot(x, [row['entropy'] for row in before], **dashed)
        rows = [layer.measures(threshold) for layer in chosen]
        inhibited.plot(x, [100 * row['inhibited_relative'] for row in rows], **style, label=label, clip_on=False)
        entropy.plot(x, [row['entropy'] for row in rows], **style, label=label)
        label = None


def draw_sorted(axis: Axes, layers: list[LayerStatistics], name: str, style: dict) -> None:
    """Draw the contributions of all channels, sorted; dashed what the norm alone makes, before CE."""
    curves = {name: (layers, '-')}
    if any(layer.ce for layer in layers):
        curves[f'{name}, before CE'] = ([layer.before_ce() for layer in layers], '--')
    for label, (chosen, line) in curves.items():
        values = np.sort(torch.cat([relative(layer) for layer in chosen]).numpy()).clip(FLOOR)
        ranks = 100 * (np.arange(len(values)) + 0.5) / len(values)
        axis.plot(ranks, values, line, color=style['color'], label=label)


def draw_gamma(axis: Axes, layers: list[LayerStatistics], name: str, style: dict) -> None:
    """Draw contribution against |gamma|, both relative to the layer, a dot a channel, and its median by tenths."""
    layers = [layer for layer in layers if layer.gamma is not None]
    if not layers:
        return
    gamma = torch.cat([layer.gamma / layer.gamma.mean() for layer in layers]).numpy().clip(FLOOR)
    contribution = torch.cat([relative(layer) for layer in layers]).numpy().clip(FLOOR)
    axis.scatter(gamma, contribution, s=5, alpha=0.25, color=style['color'], linewidths=0, rasterized=True)
    tenths = np.array_split(np.argsort(gamma), 10)
    medians = [[np.median(values[tenth]) for tenth in tenths] for values in (gamma, contribution)]
    axis.plot(*medians, **style, markersize=5, markeredgecolor='white', label=name)


def draw_learned(axis: Axes, ce: dict, name: str, style: dict, index: int) -> None:
    """Draw lambda and the gate of each CE layer."""
    x = np.arange(len(ce)) + 0.15 * index
    low, middle, high = (np.array([np.quantile(c.gate.numpy(), q) for c in ce.values()]) for q in (0.05, 0.5, 0.95))
    axis.errorbar(x + 0.1, middle, [middle - low, high - middle], fmt='_', color=style['color'], alpha=0.6,
                  label=f'{name}: gate of instance reweighting (median, 5-95%)')  # fmt: skip
    axis.plot(x, [c.lam for c in ce.values()], **style, linestyle='', label=f'{name}: lambda, share of decorrelation')
    if any(c.alpha is not None for c in ce.values()):
        alphas = [np.nan if c.alpha is None else c.alpha for c in ce.values()]
        axis.plot(x, alphas, 'x', color=style['color'], label=f'{name}: alpha, share of CE')
    axis.set_xticks(range(len(ce)), ce, rotation=90, fontsize=8)
    axis.set(ylim=(0, 1), title='What CE has learned')


def draw_off_diagonal(axis: Axes, ce: dict, name: str, style: dict, index: int) -> None:
    """Draw the off-diagonal energy before and after each CE layer."""
    x = np.arange(len(ce)) + 0.15 * index
    before, after = ([getattr(c, f'off_diagonal_{when}') for c in ce.values()] for when in ('before', 'after'))
    axis.vlines(x, before, after, color=style['color'], alpha=0.5)
    axis.plot(x, before, **style, linestyle='', markerfacecolor='none', label=f'{name}: before CE')
    axis.plot(x, after, **style, linestyle='', label=f'{name}: after CE')
    axis.set_xticks(range(len(ce)), ce, rotation=90, fontsize=8)
    axis.set(ylim=(0, 1), ylabel='off-diagonal share of energy', title='Covariance of the channels of a group')
