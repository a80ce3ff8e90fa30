"""The demo: draw a small data set, train a CE detector on it, test it, and leave a picture of what it finds.

Training and test are the commands that a user types; this script prints each before it runs it, and then how far it
is. What they print themselves goes to a file, output.txt in the work directory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from command_line import read_config

import cv2
import numpy as np
from child_process import TOOLS, run_logged
from make_shapes_dataset import make_dataset
from mmdet.apis import DetInferencer

import mmdet_ce  # noqa: F401  (torch reads the training's checkpoint once it is imported)

CONFIG = Path('configs/demo/mask-rcnn_r18-ce_fpn_8e_shapes.py')
DATA = Path('data/shapes')
# The mean of seeds 0, 1, 2 of this command, 2026-11-25 (docs/does_it_help.md)
PLAIN = dict(bbox=0.589, segm=0.599)
PLAIN_CONFIG = 'configs/demo/mask-rcnn_r18_fpn_8e_shapes.py --cfg-options model.backbone.zero_init_residual=False'
PROGRESS = re.compile(r'Epoch\(train\) +(\[\d+\]\[ *\d+/\d+\]).* (eta: \S+( days?, \S+)?) .* (loss: \S+)\s')


def draw_detections(config: Path, checkpoint: Path, images: list[Path], out_file: Path) -> None:
    """Draw what a detector finds in images, in rows of three; mmdet's visualizer writes large on large images alone."""
    inferencer = DetInferencer(str(config), str(checkpoint), show_progress=False)
    inferencer.visualizer.alpha = 0.6  # of the masks, in the colour of the class
    large = [cv2.resize(cv2.imread(str(path)), None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC) for path in images]
    drawn = inferencer(large, return_vis=True, pred_score_thr=0.5)['visualization']
    rows = [np.hstack(drawn[start : start + 3]) for start in range(0, len(drawn), 3)]
    cv2.imwrite(str(out_file), np.vstack(rows)[..., ::-1])  # RGB; OpenCV writes BGR


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), help='(default: %(default)s)')
    work_dir = parser.parse_args().work_dir
    os.chdir(TOOLS.parent)
    start, shown, log, picture = time.monotonic(), 0.0, work_dir / 'output.txt', work_dir / 'detections.png'
    for old in (log, work_dir / 'last_checkpoint', *work_dir.glob('epoch_*.pth')):  # of the demo before
        old.unlink(missing_ok=True)

    def show_progress(line: str) -> None:
        nonlocal shown
        match = PROGRESS.search(line)
        if match and time.monotonic() > shown + 30:
            shown = time.monotonic()
            print(f'epoch and iteration {match[1]}, {match[4]}, {match[2]}', flush=True)

    def run(*words: object) -> None:
        tool, *arguments = map(str, words)
        print(f'\n$ python {shlex.join([tool, *arguments])}', flush=True)
        run_logged([sys.executable, '-W', 'ignore', tool, *arguments], log, show_progress)

    if not DATA.exists():
        make_dataset(DATA)
    epochs = read_config(CONFIG).train_cfg.max_epochs
    checkpoint = work_dir / f'epoch_{epochs}.pth'
    try:
        run('tools/train.py', CONFIG, '--work-dir', work_dir)
        run('tools/test.py', CONFIG, checkpoint, '--work-dir', work_dir / 'test')
    except KeyboardInterrupt:
        sys.exit(log.read_text().rstrip().rpartition('\n')[2])  # the tool says what continues it
    with open(log, 'a') as file, redirect_stdout(file), redirect_stderr(file):
        draw_detections(CONFIG, checkpoint, sorted((DATA / 'val').iterdir())[:6], picture)
    metrics = json.loads(max(work_dir.glob('test/*/*.json')).read_text())
    found = [f'{metrics[f"coco/{key}_mAP"]:.3f}' for key in PLAIN]
    print(f'\nMask R-CNN, ResNet-18 of half width, {epochs} epochs of {DATA}, from random weights:')
    print(f'  with CE  box mAP {found[0]}  mask mAP {found[1]}')
    print(f'  plain    box mAP {PLAIN["bbox"]}  mask mAP {PLAIN["segm"]}  (mean of 3 seeds; docs/does_it_help.md)')
    print(f'           python tools/train.py {PLAIN_CONFIG}')
    print(f'  detections: {picture}\n  all that the commands printed: {log}')
    print(f'  {(time.monotonic() - start) / 60:.1f} min in all')


if __name__ == '__main__':
    main()
