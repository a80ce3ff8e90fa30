"""The demo: draw a small data set, train a CE detector on it, benchmark it, and leave pictures of what it finds.

Training and benchmark are the commands that a user types; this script prints each before it runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from make_shapes_dataset import make_dataset
from mmengine.config import Config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path('configs/demo/mask-rcnn_r18-ce_fpn_8e_shapes.py')
DATA = Path('data/shapes')


def run(*command: str) -> None:
    """Print a command and run it; stop the demo if it fails."""
    print(f'\n$ python {shlex.join(command)}', flush=True)
    if subprocess.run([sys.executable, '-W', 'ignore', *command]).returncode:
        sys.exit('demo: error: the command above failed; its message is above')


def read_metrics(work_dir: Path) -> dict[str, float]:
    """Return the metrics of the newest test run in ``work_dir``, as mmengine wrote them."""
    newest = max(work_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), help='(default: %(default)s)')
    args = parser.parse_args()
    os.chdir(ROOT)
    start = time.monotonic()

    if not DATA.exists():
        make_dataset(DATA)
    epochs = Config.fromfile(CONFIG).train_cfg.max_epochs
    checkpoint, predictions = args.work_dir / f'epoch_{epochs}.pth', args.work_dir / 'predictions.pkl'
    run('tools/train.py', str(CONFIG), '--work-dir', str(args.work_dir))
    run('tools/test.py', str(CONFIG), str(checkpoint), '--work-dir', str(args.work_dir), '--out', str(predictions))
    picture = args.work_dir / 'detections.png'
    draw = ('tools/analysis_tools/compare_detections.py', str(CONFIG), '--predictions', 'detections', str(predictions))
    run(*draw, '--out', str(picture))

    metrics = read_metrics(args.work_dir)
    print(f'\nMask R-CNN, CE-ResNet-18 of half width, {epochs} epochs of {DATA}, from random weights:')
    for name, key in (('box', 'bbox'), ('mask', 'segm')):
        print(f'  {name:4} mAP {metrics[f"coco/{key}_mAP"]:.3f}   AP50 {metrics[f"coco/{key}_mAP_50"]:.3f}')
    print(f'  detections beside ground truth: {picture}')
    print(f'  {(time.monotonic() - start) / 60:.1f} min in all')


if __name__ == '__main__':
    main()
