"""Train a config in a folder of its own, once: what is done is not run again, what was killed continues.

The engine of tools/compare_seeds.py and tools/benchmark_coco.py. In the folder, comparison.json says what was started
there and, when it is done, its metrics.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from command_line import exit_on, read_config, read_metrics

from child_process import TOOLS, run_logged
from launch import Launch
from mmengine.config import Config, DictAction
from provenance import hardware, provenance
from scalars import validations

from mmdet_ce import __version__
from mmdet_ce.checkpoints import whole_file

RECORD = 'comparison.json'


class Training(NamedTuple):
    """A config, trained with options in a folder.

    Args:
        config: The config file.
        work_dir: The folder.
        options: KEY=VALUE of the config, the seed among them.
        launch: How it is started.
        data: What its data is, where that is not what the config says, like 'a subset of COCO'.
    """

    config: str
    work_dir: Path
    options: list[str]
    launch: Launch = Launch()
    data: str = ''

    @property
    def log(self) -> Path:
        """All that its commands print."""
        return self.work_dir / 'output.txt'

    @property
    def checkpoint(self) -> Path:
        """What the last epoch writes."""
        return self.work_dir / f'epoch_{self.epochs}.pth'

    @property
    def epochs(self) -> int:
        """How many epochs it has."""
        return self.read_config().train_cfg.max_epochs

    def read_config(self) -> Config:
        """Return the config with the options merged."""
        parser = argparse.ArgumentParser()
        parser.add_argument('--options', nargs='*', action=DictAction, default={})
        return read_config(self.config, parser.parse_args(['--options', *self.options]).options)

    def identity(self) -> dict[str, Any]:
        """Return what decides the result: two trainings with the same identity are one."""
        command = self.launch.train(self.config, self.work_dir, self.options)
        start = next(i for i, word in enumerate(command) if word.startswith(str(TOOLS)))  # after the interpreter
        identity = dict(command=command[start:], config=read_config(self.config).pretty_text, version=__version__)
        return {**identity, 'data': self.data} if self.data else identity

    def record(self) -> dict[str, Any]:
        """Return what the folder says of this training; {} if it was not started there."""
        saved = self._saved()
        return saved if saved and _same(saved['identity'], self.identity()) else {}

    def is_done(self) -> bool:
        """Return whether it has metrics."""
        return bool(self.record().get('metrics'))

    def epochs_done(self) -> int:
        """Return the epochs that need not be run: those before its newest checkpoint."""
        names = [path.name for path in self.work_dir.glob('*.pth')] if self.record() else []
        matches = [re.fullmatch(r'epoch_(\d+)\.pth', name) for name in names]
        return max((int(match[1]) for match in matches if match), default=0)

    def config_problem(self) -> Optional[str]:
        """Say what is wrong with the config and its options, if something is."""
        try:
            epochs = self.read_config().get('train_cfg', {}).get('max_epochs')
        except Exception as error:  # a config is a program
            what = f'{self.config} with the options {" ".join(self.options)}'
            return f'{what} cannot be read ({type(error).__name__}: {error}); expected a config, and KEY=VALUE'
        return None if epochs else f'{self.config} has no train_cfg.max_epochs; expected a training by epochs'

    def folder_problem(self) -> Optional[str]:
        """Say that the folder holds another training, if it does: neither is it continued nor written over."""
        if self.record() or not (self._saved() or any(self.work_dir.glob('*.pth'))):
            return None
        return (
            f'{self.work_dir} holds a training of another config, other options, other data or another version, or one '
            'that does not say which; move it away, or name another --out-dir'
        )

    def _saved(self) -> dict[str, Any]:
        """Return the record in the folder; {} if there is none that ``train`` wrote."""
        try:
            saved = json.loads((self.work_dir / RECORD).read_text())
            Path(saved['identity']['command'][0])
        except (OSError, ValueError, LookupError, TypeError):
            return {}
        return saved


def train(training: Training, measure: Callable[[Training], dict[str, float]]) -> dict[str, Any]:
    """Train unless that is done; continue after the newest checkpoint if it was begun.

    Args:
        training: What to train. Its problems were looked at.
        measure: Called when it is trained; returns its metrics.

    Returns:
        The record of the folder: identity, metrics, and for each start where it ran (``provenance``).
    """
    record = training.record()
    if record.get('metrics'):
        return record
    starts = [*record.get('starts', []), provenance()]
    if not record:
        training.log.unlink(missing_ok=True)
    record = dict(identity=training.identity(), metrics={}, starts=starts)
    done = training.epochs_done()
    write_json(training.work_dir / RECORD, record)
    if done < training.epochs:
        command = training.launch.train(training.config, training.work_dir, training.options)
        run_logged([*command, *(['--resume'] if done else [])], training.log, env=training.launch.environment())
    record.update(metrics=measure(training), hardware=hardware(training.log))
    write_json(training.work_dir / RECORD, record)
    return record


def test(training: Training) -> dict[str, float]:
    """Test the last checkpoint of a training and return its mAPs, like {'coco/bbox_mAP': 0.38}."""
    folder = training.work_dir / 'test'
    command = training.launch.test(training.config, training.checkpoint, folder, training.options)
    run_logged(command, training.log, env=training.launch.environment())
    with exit_on(ValueError):
        return {key: value for key, value in read_metrics(folder).items() if key.endswith('_mAP')}


def last_validation(training: Training) -> dict[str, float]:
    """Return the mAPs of the validation after the last epoch; test, if a kill prevented that."""
    return validations(training.work_dir).get(training.epochs) or test(training)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compare identities, wherever the clone is that the tool ran in."""

    def comparable(identity: dict[str, Any]) -> dict[str, Any]:
        tool, *arguments = identity['command']
        return {**identity, 'command': [Path(tool).name, *arguments]}

    return comparable(one) == comparable(other)
