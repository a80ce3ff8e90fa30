"""Measure the channels of detectors' backbones on images, with Channel Equilibrium or without, and overlay them.

    python tools/analysis_tools/analyze_channels.py --model plain CONFIG CHECKPOINT --model ce CONFIG CHECKPOINT

What is measured of which layer: mmdet_ce/channel_analysis.py. The images are the first ones of each config's test data
set, one at a time. Writes channels.json (every channel), channels.csv (every layer) and channels.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import textwrap
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Optional

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mmdet_ce.channel_analysis import (
    ABSOLUTE_THRESHOLD,
    RELATIVE_THRESHOLD,
    LayerStatistics,
    analyze_channels,
    inhibited_share,
    network_input,
    normalized_entropy,
)
from mmdet_ce.checkpoints import CheckpointFileError
from mmdet_ce.checkpoints.trained_backbone import load_backbone
from mmdet_ce.preflight import find_problems

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = ['#d55e00', '#0072b2', '#009e73', '#cc79a7']  # told apart with any kind of colour vision (Okabe and Ito)
MARKERS = 'osD^'
FLOOR = 1e-3  # of the logarithmic axes of contribution; what is lower is drawn there
GROUPS = dict(ce='where CE sits', before='there, before CE', other='elsewhere', output='outputs')  # of layers
Models = Dict[str, Dict[str, LayerStatistics]]


def measure(name: str, cfg: Config, checkpoint: str, num_images: int, device: str) -> dict[str, LayerStatistics]:
    """Measure one model on the first images of its test data set.

    Raises:
        CheckpointFileError: If the checkpoint cannot be read.
        ValueError: If it is another model's, or there is nothing to measure.
    """
    backbone = load_backbone(cfg, checkpoint).to(device)
    preprocessor = MODELS.build(cfg.model.get('data_preprocessor') or cfg.data_preprocessor).to(device)
    cfg.test_dataloader.batch_size = 1  # no image is padded to the size of another
    loader = Runner.build_dataloader(cfg.test_dataloader)
    count = min(num_images, len(loader))
    batches = track(islice(loader, count), f'{name}: {count} images', total=count)
    return analyze_channels(backbone, (network_input(batch, preprocessor) for batch in batches))


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


def report(models: Models, args: argparse.Namespace) -> None:
    """Print the table and the bottom line; write the three files."""
    summary = summarize_all(models, args)
    table = Table(
        title=f"Channels under {args.relative_threshold:.0%} of their layer's mean contribution, and under "
        f'{args.absolute_threshold:g}; entropy (1: all equal); mean of the quarter with the smallest gammas; for CE '
        'lambda, and off-diagonal energy before and after'
    )
    for column in ('', 'layers', 'relative', 'absolute', 'entropy', 'gamma', 'lambda', 'off-diagonal'):
        table.add_column(column, justify='left' if column in ('', 'layers') else 'right')
    for row in summary:
        gamma = row['low_gamma_contribution']
        cells = [row['model'], GROUPS[row['group']], f'{row["inhibited_relative"]:.1%}']
        cells += [f'{row["inhibited_absolute"]:.1%}', f'{row["entropy"]:.3f}', '' if gamma is None else f'{gamma:.2f}']
        if 'lambda' in row:
            cells += [f'{row["lambda"]:.3f}', f'{row["off_diagonal_before"]:.2f} > {row["off_diagonal_after"]:.2f}']
        table.add_row(*cells)
    lines = bottom_line(summary)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table, lines, highlight=False)

    args.out_dir.mkdir(parents=True, exist_ok=True)
    rows = [
        dict(model=model, layer=name, **layer.measures(args.relative_threshold, args.absolute_threshold))
        for model, layers in models.items()
        for name, layer in layers.items()
    ]
    write_csv(rows, args.out_dir / 'channels.csv')
    for row in rows:
        layer = models[row['model']][row['layer']]
        row['contribution'] = layer.contribution.tolist()
        row['gamma'] = None if layer.gamma is None else layer.gamma.tolist()
    thresholds = dict(relative=args.relative_threshold, absolute=args.absolute_threshold)
    record = dict(models=args.model, num_images=args.num_images, thresholds=thresholds, summary=summary, layers=rows)
    (args.out_dir / 'channels.json').write_text(json.dumps(record))
    draw(models, lines, args)
    console.print(f'written: {", ".join(str(args.out_dir / f"channels.{end}") for end in ("json", "csv", "png"))}')


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write one row for each model and layer; cells of CE are empty where there is none."""
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def draw(models: Models, lines: str, args: argparse.Namespace) -> None:
    """Draw channels.png, the models overlaid."""
    groups = groups_of(models)
    matters = groups.get('ce') or groups['other']
    with_ce = {name: layers for name, layers in models.items() if any(layer.ce for layer in layers.values())}
    mosaic = [['inhibited', 'sorted'], ['entropy', 'gamma'], *([['learned', 'off_diagonal']] if with_ce else [])]
    size = (11 + 0.1 * sum(map(len, groups.values())), 3.7 * len(mosaic) + 0.6)
    figure, axes = plt.subplot_mosaic(mosaic, figsize=size, layout='constrained')
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
    plt.close(figure)


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--model', nargs=3, action='append', required=True, metavar=('NAME', 'CONFIG', 'CHECKPOINT'),
        help='a model to measure; once for each',
    )  # fmt: skip
    parser.add_argument('--num-images', type=int, default=100, help='(default: %(default)s)')
    parser.add_argument(
        '--relative-threshold', type=float, default=RELATIVE_THRESHOLD,
        help="a channel is inhibited under this share of its layer's mean contribution (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        '--absolute-threshold', type=float, default=ABSOLUTE_THRESHOLD,
        help='or under this contribution (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/channels'), help='(default: %(default)s)')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='of every config')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')  # mmengine's own
    if args.num_images < 1:
        sys.exit(f'error: --num-images must be at least 1, got {args.num_images}')
    if len({name for name, *_ in args.model}) < len(args.model):
        sys.exit('error: each --model needs a name of its own')
    configs = []
    for name, config, checkpoint in args.model:
        if not Path(config).is_file():
            sys.exit(f'error: config {config} of {name} not found')
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(args.cfg_options or {})
        cfg.pop('test_evaluator', None)  # nothing is evaluated
        problems = find_problems(cfg, 'test', checkpoint)
        if problems:
            sys.exit('\n'.join(f'error: {problem}' for problem in problems))
        configs.append(cfg)
    models = {}
    for (name, _, checkpoint), cfg in zip(args.model, configs):
        init_default_scope(cfg.get('default_scope', 'mmdet'))
        try:
            models[name] = measure(name, cfg, checkpoint, args.num_images, args.device)
        except (CheckpointFileError, ValueError) as error:
            sys.exit(f'error: {error}')
    if not groups_of(models).keys() & {'ce', 'other'}:
        sys.exit(f'error: {", ".join(models)} have no norm in common; expected backbones of one architecture')
    report(models, args)


if __name__ == '__main__':
    main()
