"""Kill a training at random moments, resume it each time, and check that nothing is lost and nothing changed.

    python tools/dev_scripts/soak_resume.py [CONFIG] --kills 12 --seeds 0 1 2 3

Every life of a training is ``tools/train.py --resume`` in a process group that is ended with SIGKILL: at a random
moment, start-up included, or, every other time, while a checkpoint is written. Two trainings go through this:

- one whose random numbers depend on nothing but the iteration: it has to end with the weights, optimizer and schedule
  of a training that was left alone;
- one as users run it, with random augmentation: its mAP stands beside those of trainings left alone, one for each seed.

After every kill all checkpoints are read, and what the next life loaded is held against the newest of them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import console, read_config

import torch
from demo import CONFIG
from mmengine.config import Config, DictAction
from rich.table import Table
from soak_training import STATE, Training, equal
from trainings import write_json

from mmdet_ce import __version__

FAILURES = ('resumed not as saved', 'damaged checkpoints', 'checkpoints lost')


def soak(training: Training, kills: int, longest: float, rng: random.Random) -> list[dict]:
    """Kill and resume a training, then let it end; return the records of its lives."""
    lives = []
    while len(lives) < kills and not (lives and lives[-1]['ended']):
        lives.append(training.live_and_die(len(lives) % 2 == 1, longest, rng))
        shown = {key: value for key, value in lives[-1].items() if key not in ('files', 'ended')}
        print(f'{training.work_dir.name}, life {len(lives)}: {shown}', flush=True)
    training.finish()
    return lives


def summarize(lives: list[dict]) -> dict[str, Any]:
    """Return the sums that the report is about."""
    killed = [life for life in lives if not life['ended']]
    places = [life['killed_in'] for life in killed]
    return dict(
        kills=len(killed),
        **{f'killed in {place}': places.count(place) for place in ('start-up', 'training', 'writing')},
        resumes=sum(life['resumed'] is not None for life in lives),
        **{'resumed not as saved': sum(not life.get('as_saved', True) for life in lives)},
        **{'damaged checkpoints': sum(len(life['damaged']) for life in lives)},
        **{'checkpoints lost': sum(life['lost_checkpoint'] for life in lives)},
        **{'iterations trained again': sum(life['lost_iterations'] for life in lives)},
    )


def short_config(args: argparse.Namespace) -> Config:
    """Return the config of a training that is short, validates nothing, and loads its data in its own process."""
    cfg = read_config(args.config)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.indices = args.images
    # without validation, which a training killed in its last one does not repeat
    cfg.train_cfg.update(max_epochs=args.epochs, val_begin=args.epochs + 1)
    for schedule in cfg.param_scheduler:
        if schedule.get('by_epoch', True):
            schedule.update({key: args.epochs for key in ('end', 'T_max') if key in schedule})
    cfg.merge_from_dict(args.cfg_options)
    return cfg


def soak_all(args: argparse.Namespace) -> dict[str, Any]:
    """Run all trainings; return the records of the lives, which states are equal, and the metrics."""
    cfg, rng = short_config(args), random.Random(args.soak_seed)

    def training(name: str, seed: int, repeatable: bool = False) -> Training:
        return Training(cfg, args.out_dir / name, seed, repeatable)

    alone, killed = (training(f'repeatable_{name}', args.seeds[0], True) for name in ('alone', 'killed'))
    start = time.time()
    alone.finish()
    start_up = (alone.work_dir / 'soak').stat().st_mtime - start  # made when the training began
    longest = start_up + 2 * (time.time() - start - start_up) / args.epochs
    lives = dict(repeatable=soak(killed, args.kills, longest, rng))
    final, expected = killed.final(), alone.final()
    final_equal = {key: equal(final[key], expected[key]) for key in STATE}

    killed = training('killed', args.seeds[0])
    lives['as used'] = soak(killed, args.kills, longest, rng)
    metrics = dict(killed=killed.metrics(), alone=[])
    for seed in args.seeds:
        alone = training(f'alone_{seed}', seed)
        alone.finish()
        metrics['alone'].append(alone.metrics())
        print(f'{alone.work_dir.name}: {metrics["alone"][-1]}', flush=True)
    return dict(lives=lives, final_equal=final_equal, metrics=metrics)


def report(record: dict[str, Any], out_dir: Path) -> bool:
    """Print the tables and write report.json; return whether nothing was lost or changed."""
    summary = {name: summarize(lives) for name, lives in record['lives'].items()}
    sums = Table('training', *summary)
    for key in summary['repeatable']:
        sums.add_row(key, *(str(values[key]) for values in summary.values()))
    spread = {}
    table = Table('mAP', 'killed and resumed', 'left alone: mean ± standard deviation', 'each seed')
    for key, value in record['metrics']['killed'].items():
        values = [each[key] for each in record['metrics']['alone']]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        spread[key] = abs(value - mean) <= 2 * deviation
        table.add_row(key, f'{value:.3f}', f'{mean:.3f} ± {deviation:.3f}', ' '.join(f'{v:.3f}' for v in values))
    environment = dict(torch=torch.__version__, mmdet_ce=__version__, arguments=sys.argv[1:])
    record = dict(environment=environment, summary=summary, within_two_deviations=spread, **record)
    write_json(out_dir / 'report.json', record)
    console().print(sums, table)
    console().print(f'repeatable training ends as the one left alone, bit for bit: {record["final_equal"]}')
    console().print(f'mAP within two standard deviations: {spread}; written: {out_dir / "report.json"}')
    lost = any(values[key] for values in summary.values() for key in FAILURES)
    return not lost and all(record['final_equal'].values()) and all(spread.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', nargs='?', default=str(CONFIG), help='(default: %(default)s)')
    parser.add_argument('--kills', type=int, default=12, help='of each training (default: %(default)s)')
    parser.add_argument('--images', type=int, default=64, help='of the training set (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=12, help='about one for each kill (default: %(default)s)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3], help='of mAP (default: 0 1 2 3)')
    parser.add_argument('--soak-seed', type=int, default=0, help='of the moments of the kills (default: %(default)s)')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/soak'), help='(default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error('--seeds needs two or more, for a spread')
    if args.out_dir.exists():
        parser.error(f'{args.out_dir} exists; remove it, or name another folder with --out-dir')
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    if not report(soak_all(args), args.out_dir):
        sys.exit('error: something was lost or changed; see above')


if __name__ == '__main__':
    main()
