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

import matplotlib
import numpy as np
import torch
from make_shapes_dataset import make_dataset
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path('configs/demo/mask-rcnn_r18-ce_fpn_8e_shapes.py')
DATA = Path('data/shapes')
ZOOM = 4  # the pictures show the 128-pixel images enlarged
NUM_PICTURES = 12
SCORE_THRESHOLD = 0.5


def run(*command: str) -> None:
    """Print a command and run it; stop the demo if it fails."""
    print(f'\n$ python {shlex.join(command)}', flush=True)
    if subprocess.run([sys.executable, '-W', 'ignore', *command]).returncode:
        sys.exit('demo: error: the command above failed; its message is above')


def read_metrics(work_dir: Path) -> dict[str, float]:
    """Return the metrics of the newest test run in ``work_dir``, as mmengine wrote them."""
    newest = max(work_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


def zoomed(prediction: dict) -> InstanceData:
    """Return the instances of a dumped prediction in the coordinates of the enlarged image."""
    masks = np.stack([coco_mask.decode(m) for m in prediction['masks']]) if prediction['masks'] else np.zeros((0, 1, 1))
    return InstanceData(
        bboxes=prediction['bboxes'] * ZOOM,
        labels=prediction['labels'],
        scores=prediction['scores'],
        masks=torch.from_numpy(masks.repeat(ZOOM, 1).repeat(ZOOM, 2).astype(bool)),
    )


def draw_detections(predictions: Path, out_file: Path) -> None:
    """Draw ground truth beside detections for the first validation images."""
    register_all_modules()
    cfg = Config.fromfile(CONFIG)
    dataset_cfg = cfg.test_dataloader.dataset
    for transform in dataset_cfg.pipeline:
        if transform.type == 'Resize':
            transform.scale = tuple(ZOOM * side for side in transform.scale)
    # Annotations are to be enlarged together with the image.
    dataset_cfg.pipeline.sort(key=lambda t: ('Load', 'Resi', 'Pack').index(t.type[:4]))
    dataset = DATASETS.build(dataset_cfg)
    by_id = {prediction['img_id']: prediction['pred_instances'] for prediction in load(predictions)}

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dataset.metainfo
    rows = NUM_PICTURES // 3
    figure, axes = plt.subplots(rows, 6, figsize=(15, 2.6 * rows), layout='constrained', squeeze=False)
    for index, (truth, found) in enumerate(axes.reshape(-1, 2)):
        item = dataset[index]
        image = item['inputs'].permute(1, 2, 0).numpy()[..., ::-1].copy()
        sample = item['data_samples']
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.tensor  # the visualizer draws plain tensors
        sample.pred_instances = zoomed(by_id[sample.img_id])
        for axis, what in ((truth, 'gt'), (found, 'pred')):
            visualizer.add_datasample(
                'demo', image, sample, draw_gt=what == 'gt', draw_pred=what == 'pred', pred_score_thr=SCORE_THRESHOLD
            )
            axis.imshow(visualizer.get_image())
            axis.axis('off')
        if index < 3:
            truth.set_title('ground truth')
            found.set_title(f'detections, score over {SCORE_THRESHOLD}')
    figure.savefig(out_file, dpi=110)


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
    draw_detections(predictions, picture)

    metrics = read_metrics(args.work_dir)
    print(f'\nMask R-CNN, CE-ResNet-18 of half width, {epochs} epochs of {DATA}, from random weights:')
    for name, key in (('box', 'bbox'), ('mask', 'segm')):
        print(f'  {name:4} mAP {metrics[f"coco/{key}_mAP"]:.3f}   AP50 {metrics[f"coco/{key}_mAP_50"]:.3f}')
    print(f'  detections beside ground truth: {picture}')
    print(f'  {(time.monotonic() - start) / 60:.1f} min in all')


if __name__ == '__main__':
    main()
