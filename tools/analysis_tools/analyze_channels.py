"""Measure the channels of detectors' backbones on images, with Channel Equilibrium or without, and overlay them.

    python tools/analysis_tools/analyze_channels.py --model plain CONFIG CHECKPOINT --model CE CONFIG CHECKPOINT

What is measured of which layer: mmdet_ce/channel_analysis.py. The images are the first ones of each config's test data
set, one at a time. Prints a table; writes channels.json, with every layer and channel, and channels.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import read_config

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint

from mmdet_ce.channel_analysis import INHIBITED_BELOW, LayerStatistics, analyze_channels

Models = Dict[str, Dict[str, LayerStatistics]]  # by the model's name and the layer's
COLOURS = ['#d55e00', '#0072b2', '#009e73', '#cc79a7']  # told apart with any kind of colour vision (Okabe and Ito)
MARKERS = 'osD^'
COLUMNS = {
    'inhibited': '.1%', 'inhibited_before': '.1%', 'entropy': '.3f', 'entropy_before': '.3f',
    'off_diagonal_before': '.2f', 'off_diagonal_after': '.2f', 'lambda': '.3f', 'alpha': '.3f',
}  # fmt: skip


def measure(cfg: Config, checkpoint: str, num_images: int, device: str) -> dict[str, LayerStatistics]:
    """Measure one model on the first images of its test data set.

    Raises:
        RuntimeError: If the checkpoint is another model's, in any tensor.
    """
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint, map_location='cpu', strict=True)
    model.to(device)
    cfg.test_dataloader.batch_size = 1  # no image is padded to the size of another
    batches = islice(Runner.build_dataloader(cfg.test_dataloader), num_images)
    return analyze_channels(model.backbone, (model.data_preprocessor(batch, False)['inputs'] for batch in batches))


def table(models: Models, threshold: float) -> str:
    """Return a table in Markdown: the layers that have CE in some model, and the others."""
    lines = [f'| layers | model | {" | ".join(COLUMNS)} |', '| --- ' * (len(COLUMNS) + 2) + '|']
    names = common_layers(models)
    with_ce = [name for name in names if any(layers[name].ce for layers in models.values())]
    for group, members in (('where CE is', with_ce), ('elsewhere', [name for name in names if name not in with_ce])):
        for model, layers in models.items():
            rows = [layers[name].measures(threshold) for name in members]
            lines.append(f'| {group} | {model} | {" | ".join(average(rows, key) for key in COLUMNS)} |')
    return '\n'.join(lines)


def average(rows: list[dict[str, float]], key: str) -> str:
    """Return the mean of a measure over the layers that have it, by channels if it is a share of channels."""
    rows = [row for row in rows if key in row]
    weights = [row['channels'] if key.startswith('inhibited') else 1 for row in rows]
    return format(np.average([row[key] for row in rows], weights=weights), COLUMNS[key]) if rows else ''


def common_layers(models: Models) -> list[str]:
    """Return the layers that all models have."""
    return [name for name in next(iter(models.values())) if all(name in layers for layers in models.values())]


def draw(models: Models, threshold: float, path: Path) -> None:
    """Draw the measures of each layer, the models overlaid."""
    names = common_layers(models)
    panels = {
        'inhibited': f"Channels under {threshold:.0%} of their layer's mean contribution",
        'entropy': 'Entropy of the contributions (1: all channels are equal)',
        'off_diagonal_after': 'Off-diagonal share of the energy of the covariance',
        'lambda': 'Lambda, the share of decorrelation; crosses: alpha, the share of CE',
    }
    count = 4 if any(layers[name].ce for layers in models.values() for name in names) else 2
    figure = Figure(figsize=(6 + 0.2 * len(names), 1 + 2.75 * count), layout='constrained')
    axes = figure.subplots(count, 1, sharex=True)
    for index, (model, layers) in enumerate(models.items()):
        style = dict(color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)])
        rows = [layers[name].measures(threshold) for name in names]
        column = {key: np.array([row.get(key, np.nan) for row in rows]) for row in rows for key in row}
        for axis, key in zip(axes, panels):
            if key in column:
                axis.plot(names, column[key], **style, label=model)
            before = key.replace('_after', '') + '_before'
            if before in column:
                hollow = dict(style, linestyle='', markerfacecolor='none', label=f'{model}, before CE')
                axis.plot(names, column[before], **hollow)
        if 'alpha' in column:
            axes[3].plot(names, column['alpha'], 'x', color=style['color'])
    for axis, title in zip(axes, panels.values()):
        axis.set_title(title)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[-1].tick_params('x', rotation=90)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', nargs=3, action='append', required=True, metavar=('NAME', 'CONFIG', 'CHECKPOINT'))
    parser.add_argument('--num-images', type=int, default=100, help='(default: %(default)s)')
    text = "the share of a layer's mean contribution under which a channel is inhibited"
    parser.add_argument('--threshold', type=float, default=INHIBITED_BELOW, help=text)
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/channels'), help='(default: %(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='of every config')
    args = parser.parse_args()
    models = {}
    for name, config, checkpoint in args.model:
        cfg = read_config(config, args.cfg_options)
        models[name] = measure(cfg, checkpoint, args.num_images, args.device)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    record = {
        model: {name: {**layer.measures(args.threshold), 'contribution': layer.contribution.tolist()}
                for name, layer in layers.items()}
        for model, layers in models.items()
    }  # fmt: skip
    (args.out_dir / 'channels.json').write_text(json.dumps(record))
    draw(models, args.threshold, args.out_dir / 'channels.png')
    print(table(models, args.threshold), f'written: channels.json and channels.png in {args.out_dir}', sep='\n')


if __name__ == '__main__':
    main()
