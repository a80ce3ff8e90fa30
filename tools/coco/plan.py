"""What is to be run, how far it is, and what it costs: measured in a short training of each row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from scalars import seconds_per_iteration
from trainings import Training, train

ITERATIONS = 20  # measured; the first quarter warms up


class Job(NamedTuple):
    """A row or plain counterpart, with one seed.

    Args:
        name: The row's or mmdet's name of the config.
        seed: The seed.
        training: Its training.
        is_plain: Whether it is a plain counterpart.
    """

    name: str
    seed: int
    training: Training
    is_plain: bool


def measure(job: Job, folder: Path) -> float:
    """Return the seconds an iteration of a job takes: the median of a training of 20, through the same launcher.

    Raises:
        ValueError: If it logged none.
    """
    training = job.training
    images = ITERATIONS * _images_per_step(training)
    options = [
        *training.options,
        f'train_dataloader.dataset.indices={images}',  # an epoch of 20 iterations, where there are enough images
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=2',
        'default_hooks.logger.interval=1',
        'log_processor.window_size=1',  # the time of each iteration, not a running mean
        'default_hooks.checkpoint.interval=2',
        'default_hooks.checkpoint.save_last=False',
    ]
    short = training._replace(work_dir=folder, options=options)
    if not short.is_done():
        print(f'measuring {job.name}', flush=True)
    return train(short, _seconds)['metrics']['seconds_per_iteration']


def iterations_per_epoch(training: Training, images: int) -> int:
    """Return the iterations of an epoch of so many images."""
    return math.ceil(images / _images_per_step(training))


def plan_table(jobs: list[Job], seconds: dict[str, float], images: int) -> Table:
    """Return the plan as a table, with the hours that are left."""
    gpus = jobs[0].training.launch.gpus
    unit, machine = ('GPU hours', f'{gpus} GPUs') if gpus else ('CPU hours', 'the CPU')
    table = Table(title=f'What is left to train on {machine}. Validations and tests come on top.')
    for column in ('row', 'seed', 'epochs', 'iterations', 's/iteration', 'hours', unit, 'state'):
        table.add_column(column, justify='left' if column in ('row', 'state') else 'right', overflow='fold')
    total = 0.0
    for job in jobs:
        epochs, length = job.training.epochs, iterations_per_epoch(job.training, images)  # read from the config
        left, state = _state(job.training, epochs)
        hours = left * length * seconds[job.name] / 3600
        total += hours
        table.add_row(
            job.name, str(job.seed), str(epochs), f'{epochs * length:,}',
            f'{seconds[job.name]:.3f}', _hours(hours), _hours(hours * max(gpus, 1)), state,
        )  # fmt: skip
    table.add_section()
    table.add_row('all', '', '', '', '', _hours(total), _hours(total * max(gpus, 1)), '')
    return table


def _state(training: Training, epochs: int) -> tuple[int, str]:
    """Return the epochs that are left of so many, and how far a training is in words."""
    if training.is_done():
        return 0, 'done'
    done = training.epochs_done()
    if done >= epochs:
        return 0, 'to test'
    return epochs - done, f'continues at epoch {done + 1}' if done else 'to do'


def _images_per_step(training: Training) -> int:
    return training.read_config().train_dataloader.batch_size * training.launch.processes


def _seconds(training: Training) -> dict[str, float]:
    seconds = seconds_per_iteration(training.work_dir)
    if seconds is None:
        raise ValueError(
            f'{training.config} logged no time of an iteration in {training.work_dir}; it has to keep LoggerHook and '
            'LocalVisBackend'
        )
    return {'seconds_per_iteration': seconds}


def _hours(hours: float) -> str:
    return f'{hours:.1f}' if hours >= 1 else f'{hours:.3f}'
