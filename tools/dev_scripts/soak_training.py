"""A training that soak_resume.py kills and resumes, and how two of its states are compared."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import read_metrics

import numpy as np
import torch
from child_process import exit_if_failed, process_group, run_logged, tool_command
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from mmdet_ce.checkpoints import CheckpointFileError, read_checkpoint

STATE = ('state_dict', 'optimizer', 'param_schedulers')


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


def as_saved(loaded: dict, saved: dict) -> bool:
    """Return whether the checkpoint of what a resumed training loaded is the one that it resumed from."""
    hubs = [copy.deepcopy(state['message_hub']) for state in (loaded, saved)]
    for hub in hubs:  # reading leaves the newest checkpoint's path out of what lies in another folder
        hub['runtime_info'].pop('last_ckpt', None)
    return (
        equal(*hubs)
        and all(equal(loaded[key], saved[key]) for key in STATE)
        and all(loaded['meta'][key] == saved['meta'][key] for key in ('epoch', 'iter', 'seed'))
    )


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
        cfg.custom_imports.imports = [*cfg.custom_imports.imports, 'soak_hook']
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='SoakHook', seed=seed if repeatable else None)]
        if repeatable:
            dataset = cfg.train_dataloader.dataset
            dataset.pipeline = [step for step in dataset.pipeline if not step.type.startswith('Random')]
        self.config = work_dir.with_suffix('.py')
        work_dir.mkdir(parents=True)
        cfg.dump(self.config)
        self.command = tool_command('train.py', self.config, '--resume', '--work-dir', work_dir)
        self.log = work_dir / 'output.txt'
        paths = [str(Path(__file__).resolve().parent), os.environ.get('PYTHONPATH', '')]  # where SoakHook is
        self.environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}

    def finish(self) -> None:
        """Let it run to its end."""
        run_logged(self.command, self.log, env=self.environment)

    def final(self) -> dict:
        """Return its last checkpoint."""
        return list(checkpoints(self.work_dir)[0].values())[-1]

    def metrics(self) -> dict[str, float]:
        """Evaluate its last checkpoint with tools/test.py."""
        path = self.work_dir / list(checkpoints(self.work_dir)[0])[-1]
        command = tool_command('test.py', self.config, path, '--work-dir', self.work_dir)
        run_logged(command, self.log, env=self.environment)
        return {key: value for key, value in read_metrics(self.work_dir).items() if key.endswith('_mAP')}

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
        known, start = set(self.files()), time.monotonic()
        ended = self._live(known, in_writing, rng.uniform(0, longest), rng)

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
            record['as_saved'] = resumed is None if before is None else bool(resumed) and as_saved(resumed, before)
        return record

    def _live(self, known: set[str], in_writing: bool, seconds: float, rng: random.Random) -> bool:
        """Run it until the moment of its kill and kill it; return whether it ended before."""
        writes, wanted, start = set(), rng.randint(1, 3), time.monotonic()
        with open(self.log, 'a') as log, process_group(
            self.command, stdout=log, stderr=subprocess.STDOUT, env=self.environment
        ) as process:
            while process.poll() is None:
                if in_writing:
                    writes |= {name.strip('.').split('.pth')[0] for name in self.files() if name not in known}
                    if len(writes) >= wanted:
                        time.sleep(rng.uniform(0, 0.01))
                        break
                elif time.monotonic() > start + seconds:
                    break
                time.sleep(0.001)
            ended = process.poll() is not None
            if not ended:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if ended:
            exit_if_failed(self.command, process.returncode, self.log)
        return ended
