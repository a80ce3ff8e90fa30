"""Measure the channels of detectors on images, with Channel Equilibrium or without, and compare them in a table.

    python tools/analysis_tools/analyze_channels.py --model plain CONFIG CHECKPOINT --model CE CONFIG CHECKPOINT

What is measured of which layer: mmdet_ce/channel_analysis.py. The images are the first ones of each config's test data
set, one at a time. Prints a table of means over layers; writes channels.json, with every layer and channel.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import exit_on_problems, read_config

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint

from mmdet_ce.channel_analysis import watch_channels

COLUMNS = {
    'inhibited': '.1%',
    'inhibited_before': '.1%',
    'off_diagonal_before': '.2f',
    'off_diagonal_after': '.2f',
    'lambda': '.3f',
    'alpha': '.3f',
}


def measure(cfg: Config, checkpoint: str, args: argparse.Namespace) -> dict[str, dict]:
    """Return the measures of one model's layers, by name, on the first images of its test data set.

    Raises:
        RuntimeError: If the checkpoint is another model's, in any tensor.
    """
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint, map_location='cpu', strict=True)
    model.to(get_device()).eval()
    cfg.test_dataloader.batch_size = 1  # no image is padded to the size of another
    with torch.no_grad(), watch_channels(model) as layers:
        for batch in islice(Runner.build_dataloader(cfg.test_dataloader), args.num_images):
            model.test_step(batch)
    if not layers:
        exit_on_problems(['nothing to measure: there is no image, or the model has no norm over (N, C, H, W)'])
    return {name: {**layer.measures(), 'contribution': layer.contribution.tolist()} for name, layer in layers.items()}


def table(models: dict[str, dict[str, dict]]) -> str:
    """Return a table in Markdown, of the layers that all models have: where some model has CE, and elsewhere."""
    lines = [f'| layers | model | {" | ".join(COLUMNS)} |', '| --- ' * (len(COLUMNS) + 2) + '|']
    common = set.intersection(*map(set, models.values()))
    with_ce = {name for layers in models.values() for name in common if 'lambda' in layers[name]}
    for place, names in (('where CE is', with_ce), ('elsewhere', common - with_ce)):
        for model, layers in models.items():
            rows = [layers[name] for name in names]
            lines.append(f'| {place} | {model} | {" | ".join(average(rows, key) for key in COLUMNS)} |')
    return '\n'.join(lines)


def average(rows: list[dict], key: str) -> str:
    """Return the mean of a measure over the layers that have it, by channels if it is a share of channels."""
    rows = [row for row in rows if key in row]
    weights = [row['channels'] if key.startswith('inhibited') else 1 for row in rows]
    return format(np.average([row[key] for row in rows], weights=weights), COLUMNS[key]) if rows else ''


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', nargs=3, action='append', required=True, metavar=('NAME', 'CONFIG', 'CHECKPOINT'))
    parser.add_argument('--num-images', type=int, default=100, help='(default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/channels.json'), help='(default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='of every config')
    args = parser.parse_args()
    models = {
        name: measure(read_config(config, args.cfg_options), checkpoint, args)
        for name, config, checkpoint in args.model
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(models))
    print(table(models), f'written: {args.out}', sep='\n')


if __name__ == '__main__':
    main()
