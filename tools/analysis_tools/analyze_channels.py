"""Measure the channels of detectors' backbones on images, with Channel Equilibrium or without, and overlay them.

    python tools/analysis_tools/analyze_channels.py --model plain CONFIG CHECKPOINT --model ce CONFIG CHECKPOINT

What is measured of which layer: mmdet_ce/channel_analysis.py. The images are the first ones of each config's test data
set, one at a time. Writes channels.json (every channel), channels.csv (every layer) and channels.png.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import exit_on, exit_on_problems, flush_denormals, read_config

import torch
from channel_figure import draw
from channel_report import print_table, write_files
from channel_summary import Models, bottom_line, groups_of, summarize_all
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from rich.progress import track

from mmdet_ce.channel_analysis import (
    ABSOLUTE_THRESHOLD,
    RELATIVE_THRESHOLD,
    LayerStatistics,
    analyze_channels,
    network_input,
)
from mmdet_ce.checkpoints import CheckpointFileError
from mmdet_ce.checkpoints.trained_backbone import load_backbone
from mmdet_ce.preflight import find_problems


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
    if args.num_images < 1:
        sys.exit(f'error: --num-images must be at least 1, got {args.num_images}')
    if len({name for name, *_ in args.model}) < len(args.model):
        sys.exit('error: each --model needs a name of its own')
    configs = []
    for name, config, checkpoint in args.model:
        cfg = read_config(config, args.cfg_options, name)
        cfg.pop('test_evaluator', None)  # nothing is evaluated
        exit_on_problems(find_problems(cfg, 'test', checkpoint))
        configs.append(cfg)
    flush_denormals()
    models: Models = {}
    for (name, _, checkpoint), cfg in zip(args.model, configs):
        init_default_scope(cfg.get('default_scope', 'mmdet'))
        with exit_on(CheckpointFileError, ValueError):
            models[name] = measure(name, cfg, checkpoint, args.num_images, args.device)
    if not groups_of(models).keys() & {'ce', 'other'}:
        sys.exit(f'error: {", ".join(models)} have no norm in common; expected backbones of one architecture')
    summary = summarize_all(models, args)
    print_table(summary, args)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    write_files(models, summary, args)
    draw(models, bottom_line(summary), args)
    print(f'written: {", ".join(str(args.out_dir / f"channels.{end}") for end in ("json", "csv", "png"))}')


if __name__ == '__main__':
    main()
