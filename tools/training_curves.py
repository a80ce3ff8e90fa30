"""Draw the losses and the validations of trainings over their epochs: the mean over seeds, and each seed thinly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scalars import training_records, validations

SMOOTHED = 0.05  # of a training: the width of the moving average of its loss


def draw_curves(folders: dict[str, list[Path]], path: Path) -> None:
    """Draw one panel for the training loss and one for each mAP.

    Args:
        folders: The work directories of each run's seeds, by the run's name.
        path: The picture to write.
    """
    names = [name for runs in folders.values() for run in runs for maps in validations(run).values() for name in maps]
    metrics = list(dict.fromkeys(names))
    figure = Figure(figsize=(5 * (1 + len(metrics)), 4), layout='constrained')
    panels = figure.subplots(1, 1 + len(metrics), sharex=True, squeeze=False)[0]
    for index, (name, runs) in enumerate(folders.items()):
        color = f'C{index}'
        _draw_run(panels[0], [loss_curve(run) for run in runs], name, color)
        for axis, metric in zip(panels[1:], metrics):
            _draw_run(axis, [map_curve(run, metric) for run in runs], name, color, marker='o', markersize=3)
    for axis, title in zip(panels, ['training loss, smoothed', *(name[len('coco/') :] for name in metrics)]):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel('epoch')
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    panels[0].set_yscale('log')
    panels[0].yaxis.set_major_formatter('{x:g}')
    panels[0].yaxis.set_minor_formatter('{x:g}')
    panels[0].legend(fontsize=8)
    figure.suptitle('thin: seeds; thick: their mean', fontsize=10)
    figure.savefig(path, dpi=120)


def loss_curve(work_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and smoothed losses of a training, both [N]."""
    records = training_records(work_dir)
    if not records:
        return np.empty(0), np.empty(0)
    length = max(record['step'] for record in records) / max(record['epoch'] for record in records)
    epochs = np.array([record['step'] / length for record in records])
    losses = np.array([record['loss'] for record in records])
    width = max(1, round(SMOOTHED * len(losses)))
    sums = np.convolve(losses, np.ones(width))[: len(losses)]
    return epochs, sums / np.minimum(np.arange(1, len(losses) + 1), width)  # over the records before each


def map_curve(work_dir: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and mAPs of a training's validations, both [N]."""
    found = {epoch: maps[metric] for epoch, maps in validations(work_dir).items() if metric in maps}
    return np.array(list(found)), np.array(list(found.values()))


def _draw_run(axis: Axes, curves: list[tuple[np.ndarray, np.ndarray]], name: str, color: str, **line: object) -> None:
    """Draw the seeds of a run, and their mean where all of them have a point."""
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return
    if len(curves) > 1:
        for x, y in curves:
            axis.plot(x, y, color=color, alpha=0.45, linewidth=0.9)
    common = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
    means = np.mean([y[np.isin(x, common)] for x, y in curves], axis=0)
    axis.plot(common, means, color=color, linewidth=1.8, label=name, **line)
