"""Draw ground truth beside the detections of one or several detectors on the same images, in one picture.

    python tools/analysis_tools/compare_detections.py CONFIG --predictions plain a.pkl --predictions ce b.pkl

The predictions are what ``tools/test.py CONFIG CHECKPOINT --out FILE.pkl`` writes; images and ground truth are those of
the config's test data set.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import exit_on, exit_on_problems, read_config

import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from mmdet.datasets import get_loading_pipeline
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config, DictAction
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from rich.progress import track

from mmdet_ce.checkpoints import CheckpointFileError, read_predictions
from mmdet_ce.preflight import find_problems

SIDE = 512  # pixels of the longer side that boxes and labels are drawn at
COLUMNS = 6


def resized(prediction: dict, sample: DetDataSample) -> InstanceData:
    """Return the instances of a dumped prediction in the coordinates of the resized image."""
    height, width = sample.img_shape
    instances = InstanceData(
        bboxes=prediction['bboxes'] * prediction['bboxes'].new_tensor(sample.scale_factor).repeat(2),
        labels=prediction['labels'],
        scores=prediction['scores'],
    )
    if 'masks' in prediction:
        masks = map(coco_mask.decode, prediction['masks'])
        masks = [mmcv.imresize(mask, (width, height), interpolation='nearest') for mask in masks]
        instances.masks = torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, height, width))
    return instances


def draw_detections(
    cfg: Config, predictions: dict[str, str | Path], out_file: Path, num_images: int = 12, score_threshold: float = 0.5
) -> None:
    """Draw the first test images, ground truth beside detections.

    Args:
        cfg: Config of the test data set; how annotations are loaded is read from its training pipeline.
        predictions: Files of dumped predictions, by the name that is written over them.
        out_file: The picture to write.
        num_images: Images to draw.
        score_threshold: Score over which detections are drawn.

    Raises:
        ValueError: If a file holds no predictions of these images.
    """
    register_all_modules()
    dataset_cfg = cfg.test_dataloader.dataset
    dataset_cfg.pipeline = [
        *get_loading_pipeline(cfg.train_dataloader.dataset.pipeline),
        dict(type='Resize', scale=(SIDE, SIDE), keep_ratio=True),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_shape', 'scale_factor')),
    ]
    dataset = DATASETS.build(dataset_cfg)
    found = {}
    for name, path in predictions.items():
        try:
            found[name] = {one['img_id']: one['pred_instances'] for one in read_predictions(path)}
        except KeyError as error:
            raise ValueError(f'{path} holds no predictions; expected what tools/test.py --out writes') from error

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dataset.metainfo
    num_images = min(num_images, len(dataset))
    titles = ['ground truth', *(f'{name}, score over {score_threshold}' for name in found)]
    per_row = max(min(COLUMNS // len(titles), num_images), 1)
    rows = -(-num_images // per_row)
    columns = per_row * len(titles)
    figure = Figure(figsize=(2.5 * columns, 2.6 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    cells = axes.reshape(-1, len(titles))
    for index in track(range(num_images), 'drawing'):
        item = dataset[index]
        image = item['inputs'].permute(1, 2, 0).numpy()[..., ::-1].copy()
        sample = item['data_samples']
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.tensor  # the visualizer draws plain tensors
        for axis, title, name in zip(cells[index], titles, [None, *found]):
            if name is not None:
                if sample.img_id not in found[name]:
                    raise ValueError(f'{predictions[name]} lacks image {sample.img_id} of the test data set')
                sample.pred_instances = resized(found[name][sample.img_id], sample)
            visualizer.add_datasample(
                'detections', image, sample, draw_gt=name is None, draw_pred=name is not None,
                pred_score_thr=score_threshold,
            )  # fmt: skip
            axis.imshow(visualizer.get_image())
            if index < per_row:
                axis.set_title(title)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_file, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='the config whose test data set the predictions are of')
    parser.add_argument(
        '--predictions', nargs=2, action='append', required=True, metavar=('NAME', 'FILE'),
        help='what tools/test.py --out wrote; once for each detector',
    )  # fmt: skip
    parser.add_argument('--num-images', type=int, default=12, help='(default: %(default)s)')
    parser.add_argument('--score-thr', type=float, default=0.5, help='draw what scores higher (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/detections.png'), help='(default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', message='Warning: The (bbox|polygon) is out of bounds')  # it touches the border
    if args.num_images < 1:
        sys.exit(f'error: --num-images must be at least 1, got {args.num_images}')
    cfg = read_config(args.config, args.cfg_options)
    for _, path in args.predictions:
        if not Path(path).is_file():
            sys.exit(f'error: predictions {path} not found; tools/test.py CONFIG CHECKPOINT --out {path} writes them')
    cfg.pop('test_evaluator', None)  # nothing is evaluated
    exit_on_problems(find_problems(cfg, 'test'))
    with exit_on(CheckpointFileError, ValueError):
        draw_detections(cfg, dict(args.predictions), args.out, args.num_images, args.score_thr)
    print(f'written: {args.out}')


if __name__ == '__main__':
    main()
