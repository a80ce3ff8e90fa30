"""Kill a training at random moments, resume it each time, and check that nothing is lost and nothing changed.

    python tools/soak_resume.py [CONFIG] --kills 12 --seeds 0 1 2 3

Every life of a training is ``tools/train.py --resume`` in a process group that is ended with SIGKILL: at a random
moment, start-up included, or, every other time, while a checkpoint is written. Two trainings go through this:

- one whose random numbers depend on nothing but the iteration: it has to end with the weights, optimizer and schedule
  of a training that was left alone;
- one as users run it, with random augmentation: its mAP stands beside those of trainings left alone, one for each seed.

After every kill all checkpoints are read, and what the next life loaded is held against the newest of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import framework_tool  # noqa: F401 - quiets a warning of mmengine's that says nothing about the run
import numpy as np
import torch
from demo import CONFIG, read_metrics
from mmdet.registry import HOOKS
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner, set_random_seed
from rich.console import Console
from rich.table import Table

from mmdet_ce import __version__
from mmdet_ce.checkpoints import CheckpointFileError, read_checkpoint, whole_file

TOOLS = Path(__file__).resolve().parent
STATE = ('state_dict', 'optimizer', 'param_schedulers')
FAILURES = ('resumed not as saved', 'damaged checkpoints', 'checkpoints lost')


@HOOKS.register_module()
class SoakHook(Hook):
    """Save what a resumed training loaded, and count its iterations.

    Args:
        seed: If given, random numbers are drawn from it and the iteration's number alone.
    """

    priority = 'HIGHEST'

    def __init__(self, seed: Optional[int] = None) -> None:
        self.seed = seed

    def before_train(self, runner: Runner) -> None:
        """Save the state before another hook or an iteration changes it."""
        self.folder = Path(runner.work_dir, 'soak')
        self.folder.mkdir(exist_ok=True)
        if runner.iter:
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            runner.save_checkpoint(str(self.folder), 'resumed.pth', meta=meta, backend_args=dict(backend='atomic'))
        self.after_train_iter(runner, -1)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed what the first batch draws."""
        if self.seed is not None:
            set_random_seed(self.seed + runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the iteration and the next batch draw."""
        self.before_train_epoch(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Leave the number of iterations where a kill does not take it."""
        (self.folder / 'iterations').write_text(str(runner.iter + (batch_idx >= 0)))


def equal(a: Any, b: Any) -> bool:
    """Compare two states of a training bit for bit."""
    if isinstance(a, HistoryBuffer):
        return isinstance(b, HistoryBuffer) and equal(a.data, b.data)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return a.tobytes() == b.tobytes() if isinstance(a, (np.ndarray, np.generic)) else a == b


def checkpoints(work_dir: Path) -> tuple[dict[str, dict], list[str]]:
    """Read the checkpoints of a training; return the whole ones, oldest first, and the names of those that are not."""
    whole, damaged = {}, []
    for path in work_dir.glob('[ei]*_*.pth'):
        try:
            whole[path.name] = read_checkpoint(path)
        except CheckpointFileError:
            damaged.append(path.name)
    return dict(sorted(whole.items(), key=lambda item: item[1]['meta']['iter'])), damaged


class Training:
    """A training that can be killed.

    Args:
        cfg: Its config.
        work_dir: Its work directory.
        seed: Its random seed.
        repeatable: Whether it draws random numbers by iteration, and does not augment.
    """

    def __init__(self, cfg: Config, work_dir: Path, seed: int, repeatable: bool) -> None:
        self.work_dir = work_dir
        cfg = copy.deepcopy(cfg)
        cfg.randomness = dict(seed=seed)
        cfg.custom_imports.imports = [*cfg.custom_imports.imports, 'soak_resume']
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='SoakHook', seed=seed if repeatable else None)]
        if repeatable:
            dataset = cfg.train_dataloader.dataset
            dataset.pipeline = [step for step in dataset.pipeline if not step.type.startswith('Random')]
        self.config = work_dir.with_suffix('.py')
        work_dir.mkdir(parents=True)
        cfg.dump(self.config)

    def start(self) -> subprocess.Popen:
        """Start or resume it, in a process group of its own."""
        command = [sys.executable, '-W', 'ignore', str(TOOLS / 'train.py'), str(self.config), '--resume']
        with open(self.work_dir / 'output.txt', 'a') as log:
            return subprocess.Popen(
                [*command, '--work-dir', str(self.work_dir)], stdout=log, stderr=log, start_new_session=True
            )

    def finish(self) -> None:
        """Let it run to its end."""
        if self.start().wait():
            self.fail()

    def fail(self) -> None:
        """End the soak because the training ended with an error."""
        log = self.work_dir / 'output.txt'
        sys.exit(f'error: a training failed that should not: {log}\n{log.read_text()[-1500:]}')

    def final(self) -> dict:
        """Return its last checkpoint."""
        return list(checkpoints(self.work_dir)[0].values())[-1]

    def metrics(self) -> dict[str, float]:
        """Evaluate its last checkpoint with tools/test.py."""
        path = self.work_dir / list(checkpoints(self.work_dir)[0])[-1]
        command = [sys.executable, '-W', 'ignore', str(TOOLS / 'test.py'), str(self.config), str(path)]
        with open(self.work_dir / 'output.txt', 'a') as log:
            if subprocess.run([*command, '--work-dir', str(self.work_dir)], stdout=log, stderr=log).returncode:
                self.fail()
        metrics = read_metrics(self.work_dir)
        return {key: metrics[key] for key in metrics if key.endswith('_mAP')}

    def files(self) -> dict[str, int]:
        """Return the checkpoints and what is being written, by name, with their sizes."""
        found = {}
        for entry in os.scandir(self.work_dir):
            if entry.name.endswith(('.pth', '.tmp')):
                try:
                    found[entry.name] = entry.stat().st_size
                except FileNotFoundError:  # moved to its place, or deleted, just now
                    continue
        return found

    def live_and_die(self, in_writing: bool, longest: float, rng: random.Random) -> dict:
        """Start or resume it, kill it, and check what it did and what it left.

        Args:
            in_writing: Whether to kill it while it writes one of its next three checkpoints.
            longest: Otherwise, the most seconds that it may live.
            rng: Draws the moment.

        Returns:
            The record of this life; ``ended`` if the training ended before it was killed.
        """
        before = [None, *checkpoints(self.work_dir)[0].values()][-1]
        loaded, counter = self.work_dir / 'soak' / 'resumed.pth', self.work_dir / 'soak' / 'iterations'
        loaded.unlink(missing_ok=True)
        counter.unlink(missing_ok=True)
        known, writes, wanted, life = set(self.files()), set(), rng.randint(1, 3), rng.uniform(0, longest)
        start, process = time.monotonic(), self.start()
        while process.poll() is None:
            if in_writing:
                writes |= {name.strip('.').split('.pth')[0] for name in self.files() if name not in known}
                if len(writes) >= wanted:
                    time.sleep(rng.uniform(0, 0.01))
                    break
            elif time.monotonic() > start + life:
                break
            time.sleep(0.001)
        ended = process.poll() is not None
        if ended and process.returncode:
            self.fail()
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        whole, damaged = checkpoints(self.work_dir)
        after = [None, *whole.values()][-1]
        started = counter.is_file()
        saved = after['meta']['iter'] if after else 0
        resumed = read_checkpoint(loaded) if loaded.is_file() else None
        unfinished = [name for name in self.files() if name.endswith('.tmp') and name not in known]
        record = dict(
            ended=ended,
            seconds=round(time.monotonic() - start, 2),
            killed_in=None if ended else 'writing' if unfinished or damaged else 'training' if started else 'start-up',
            files=self.files(),
            damaged=damaged,
            resumed=resumed['meta']['iter'] if resumed else None,
            saved=saved,
            lost_iterations=int(counter.read_text() or saved) - saved if started and not ended else 0,
            lost_checkpoint=before is not None and saved < before['meta']['iter'],
        )
        if started:  # what it loaded is the newest whole checkpoint, or nothing where there was none
            record['as_saved'] = (before is None) == (resumed is None) and (
                before is None
                or all(equal(before[key], resumed[key]) for key in (*STATE, 'message_hub'))
                and all(before['meta'][key] == resumed['meta'][key] for key in ('epoch', 'iter', 'seed'))
            )
        return record


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
    if not Path(args.config).is_file():
        parser.error(f'config {args.config} not found')
    if len(args.seeds) < 2:
        parser.error('--seeds needs two or more, for a spread')
    if args.out_dir.exists():
        parser.error(f'{args.out_dir} exists; remove it, or name another folder with --out-dir')
    cfg = Config.fromfile(args.config)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.indices = args.images
    # without validation, which a training killed in its last one does not repeat
    cfg.train_cfg.update(max_epochs=args.epochs, val_begin=args.epochs + 1)
    for schedule in cfg.param_scheduler:
        if schedule.get('by_epoch', True):
            schedule.update({key: args.epochs for key in ('end', 'T_max') if key in schedule})
    cfg.merge_from_dict(args.cfg_options)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    rng = random.Random(args.soak_seed)

    def training(name: str, seed: int, repeatable: bool = False) -> Training:
        return Training(cfg, args.out_dir / name, seed, repeatable)

    console = Console(width=None if sys.stdout.isatty() else 120)
    alone, killed = (training(f'repeatable_{name}', args.seeds[0], True) for name in ('alone', 'killed'))
    start = time.time()
    alone.finish()
    start_up = (alone.work_dir / 'soak').stat().st_mtime - start  # made when the training began
    longest = start_up + 2 * (time.time() - start - start_up) / args.epochs
    lives = dict(repeatable=soak(killed, args.kills, longest, rng))
    final, expected = killed.final(), alone.final()
    as_alone = {key: equal(final[key], expected[key]) for key in STATE}

    killed = training('killed', args.seeds[0])
    lives['as used'] = soak(killed, args.kills, longest, rng)
    metrics = dict(killed=killed.metrics(), alone=[])
    for seed in args.seeds:
        alone = training(f'alone_{seed}', seed)
        alone.finish()
        metrics['alone'].append(alone.metrics())
        print(f'{alone.work_dir.name}: {metrics["alone"][-1]}', flush=True)

    spread = {}
    table = Table('mAP', 'killed and resumed', 'left alone: mean ± standard deviation', 'each seed')
    for key, value in metrics['killed'].items():
        values = [each[key] for each in metrics['alone']]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        spread[key] = abs(value - mean) <= 2 * deviation
        table.add_row(key, f'{value:.3f}', f'{mean:.3f} ± {deviation:.3f}', ' '.join(f'{v:.3f}' for v in values))
    summary = {name: summarize(records) for name, records in lives.items()}
    record = dict(
        environment=dict(torch=torch.__version__, mmdet_ce=__version__, arguments=sys.argv[1:]),
        summary=summary,
        final_equal=as_alone,
        metrics=metrics,
        within_two_deviations=spread,
        lives=lives,
    )
    with whole_file(args.out_dir / 'report.json') as file:
        file.write(json.dumps(record, indent=1).encode())
    sums = Table('training', *summary)
    for key in summary['repeatable']:
        sums.add_row(key, *(str(values[key]) for values in summary.values()))
    console.print(sums, table)
    console.print(f'repeatable training ends as the one left alone, bit for bit: {as_alone}')
    console.print(f'mAP within two standard deviations: {spread}; written: {args.out_dir / "report.json"}')
    lost = any(values[key] for values in summary.values() for key in FAILURES)
    if lost or not all(as_alone.values()) or not all(spread.values()):
        sys.exit('error: something was lost or changed; see above')


if __name__ == '__main__':
    main()
