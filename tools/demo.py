"""The demo: draw a small data set, train a CE detector on it, benchmark it, and leave pictures of what it finds.

Training and benchmark are the commands that a user types; this script prints each before it runs it, and then how far
it is. What they print themselves goes to a file, output.txt in the work directory.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from command_line import exit_on, read_config, read_metrics

from child_process import run_logged, tool_command
from make_shapes_dataset import make_dataset
from rich.progress import BarColumn, Progress, TextColumn

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path('configs/demo/mask-rcnn_r18-ce_fpn_8e_shapes.py')
DATA = Path('data/shapes')
ITERATION = re.compile(
    r'Epoch\(train\) +\[(?P<epoch>\d+)\]\[ *(?P<iteration>\d+)/(?P<length>\d+)\].* eta: (?P<left>.*?) +time: '
    r'.* loss: (?P<loss>\S+)\s'
)
SECONDS_BETWEEN_LINES = 30


@contextlib.contextmanager
def training_progress(epochs: int) -> Iterator[Callable[[str], None]]:
    """Show how far a training of so many epochs is: a bar in a terminal, elsewhere a line now and then.

    Yields:
        What to call with each line that the training prints.
    """
    bar = Progress(BarColumn(), TextColumn('{task.description}'), disable=not sys.stdout.isatty())
    task, printed = bar.add_task('starting'), -math.inf

    def watch(line: str) -> None:
        nonlocal printed
        match = ITERATION.search(line)
        if match is None:
            return
        epoch, iteration, length = (int(match[key]) for key in ('epoch', 'iteration', 'length'))
        place = f'epoch {epoch}/{epochs}, iteration {iteration}/{length}'
        text = f'{place}: loss {match["loss"]}, {match["left"]} left'
        bar.update(task, description=text, completed=(epoch - 1) * length + iteration, total=epochs * length)
        if bar.disable and time.monotonic() > printed + SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            print(text, flush=True)

    with bar:
        yield watch


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), help='(default: %(default)s)')
    args = parser.parse_args()
    os.chdir(ROOT)
    start = time.monotonic()
    log = args.work_dir / 'output.txt'
    log.unlink(missing_ok=True)

    def run(tool: str, *arguments: object, **options: Any) -> None:
        print(f'\n$ python tools/{tool} {shlex.join(map(str, arguments))}', flush=True)
        run_logged(tool_command(tool, *arguments), log, **options)

    if not DATA.exists():
        make_dataset(DATA)
    epochs = read_config(CONFIG).train_cfg.max_epochs
    with training_progress(epochs) as watch:
        run('train.py', CONFIG, '--work-dir', args.work_dir, watch=watch)
    checkpoint, predictions = args.work_dir / f'epoch_{epochs}.pth', args.work_dir / 'predictions.pkl'
    run('test.py', CONFIG, checkpoint, '--work-dir', args.work_dir, '--out', predictions)
    picture = args.work_dir / 'detections.png'
    drawn = ('--predictions', 'detections', predictions)
    run('analysis_tools/compare_detections.py', CONFIG, *drawn, '--out', picture)

    with exit_on(ValueError):
        metrics = read_metrics(args.work_dir)
    print(f'\nMask R-CNN, CE-ResNet-18 of half width, {epochs} epochs of {DATA}, from random weights:')
    for name, key in (('box', 'bbox'), ('mask', 'segm')):
        print(f'  {name:4} mAP {metrics[f"coco/{key}_mAP"]:.3f}   AP50 {metrics[f"coco/{key}_mAP_50"]:.3f}')
    print(f'  detections beside ground truth: {picture}')
    print(f'  all that the commands printed: {log}')
    print(f'  {(time.monotonic() - start) / 60:.1f} min in all')


if __name__ == '__main__':
    main()
