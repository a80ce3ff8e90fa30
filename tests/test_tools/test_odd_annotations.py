"""Odd annotations, through the framework's own data pipeline and a real detector."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from make_shapes_dataset import CLASSES
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from PIL import Image

DEMO = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18-ce_fpn_8e_shapes.py'


def picture() -> bytes:
    """Return an encoded image of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, 'PNG')
    return file.getvalue()


def annotated(image_id: int, box: list, **changes) -> dict:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    ann = dict(image_id=image_id, category_id=1, bbox=box, area=w * h, segmentation=[polygon], iscrowd=0)
    return {**ann, **changes}


@pytest.fixture
def build(tmp_path):
    """Write a data set of these images, (bytes, width, height), and annotations; build it with the demo's pipeline."""

    def call(split: str, images: list[tuple[bytes, int, int]], annotations: list[dict], **changes):
        listed = []
        for index, (content, width, height) in enumerate(images):
            (tmp_path / str(index)).write_bytes(content)
            listed.append(dict(id=index, file_name=str(index), width=width, height=height))
        annotations = [dict(id=index, **ann) for index, ann in enumerate(annotations)]
        categories = [dict(id=1 + i, name=name) for i, name in enumerate((*CLASSES, 'unknown'))]
        coco = dict(images=listed, annotations=annotations, categories=categories)
        (tmp_path / 'annotations.json').write_text(json.dumps(coco))
        cfg = Config.fromfile(DEMO)[f'{split}_dataloader'].dataset
        cfg.update(data_root=str(tmp_path), ann_file='annotations.json', data_prefix=dict(img=''), **changes)
        return DATASETS.build(cfg)

    return call


@pytest.fixture(scope='module')
def model():
    return MODELS.build(Config.fromfile(DEMO).model)


def train_step(model, dataset) -> float:
    """Run forward and backward over all images as one batch; return the loss."""
    model.train().zero_grad()
    batch = model.data_preprocessor(pseudo_collate([dataset[i] for i in range(len(dataset))]), True)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    return loss.item()


def test_odd_annotations_are_left_out(build, model):
    """No objects, crowd alone, boxes outside the image, without area or NaN, a category the config lacks."""
    images = [(picture(), 64, 64)] * 6
    annotations = [
        annotated(1, [5, 5, 20, 20], iscrowd=1, segmentation=dict(size=[64, 64], counts=[320, 100, 3676])),
        annotated(2, [100, 100, 20, 20]),
        annotated(2, [50, 50, 30, 30]),
        annotated(3, [5, 5, 0, 0]),
        annotated(3, [30, 30, -9, -9]),
        annotated(4, [5, 5, 20, 20], category_id=len(CLASSES) + 1),
        annotated(5, [math.nan] * 4),
        annotated(77, [5, 5, 20, 20]),
    ]
    dataset = build('train', images, annotations, filter_cfg=None)
    samples = [dataset[i]['data_samples'] for i in range(len(dataset))]
    assert [len(sample.gt_instances) for sample in samples] == [0, 0, 1, 0, 0, 0]
    assert [len(sample.ignored_instances) for sample in samples] == [0, 1, 0, 0, 0, 0]
    assert math.isfinite(train_step(model, dataset))
    assert len(build('train', images, annotations)) < len(images), 'by default images without objects are left out'


def test_evaluation_without_objects(build, model, tmp_path):
    dataset = build('test', [(picture(), 64, 64)], [])
    metric = METRICS.build(dict(type='CocoMetric', ann_file=str(tmp_path / 'annotations.json'), metric='bbox'))
    metric.dataset_meta = dataset.metainfo
    with torch.no_grad():
        results = model.eval().test_step(pseudo_collate([dataset[0]]))
    metric.process({}, [result.to_dict() for result in results])
    assert metric.evaluate(1)['coco/bbox_mAP'] == -1, "COCO's value for nothing to find"
