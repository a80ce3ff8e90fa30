"""One line for each input that would fail in silence or late; nothing of what trains is refused."""

from __future__ import annotations

import json
import re
import sys

import pytest
from checks import find_problems
from conftest import ROOT
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from utils import call

CONFIG = ROOT / 'configs' / 'ce' / 'mask-rcnn_r50-ce_fpn_1x_coco.py'
DEMO = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18-ce_fpn_8e_shapes.py'
COCO = CocoDataset.METAINFO['classes']


@pytest.fixture
def write(tmp_path):
    """Write the annotations of the training and the validation with these categories."""

    def call(names, **content):
        (tmp_path / 'annotations').mkdir(exist_ok=True)
        categories = [dict(id=1 + i, name=name, skeleton=[[1, 2]]) for i, name in enumerate(names)]
        for split in ('train', 'val'):
            path = tmp_path / 'annotations' / f'instances_{split}2017.json'
            path.write_text(json.dumps(dict(images=[], annotations=[], categories=categories, **content)))
            (tmp_path / f'{split}2017').mkdir(exist_ok=True)

    call(COCO)
    return call


@pytest.fixture
def cfg(tmp_path, write):
    """A shipped config on a data set, with no initial weights."""
    cfg = Config.fromfile(CONFIG)
    for name in ('train', 'val', 'test'):
        cfg[f'{name}_dataloader'].dataset.data_root = str(tmp_path)
    for name in ('val', 'test'):
        cfg[f'{name}_evaluator'].ann_file = str(tmp_path / 'annotations' / 'instances_val2017.json')
    cfg.model.backbone.init_cfg = None
    return cfg


def own_classes(cfg, classes) -> None:
    """Set the classes of the training, as a user does for a data set of their own."""
    cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
    for head in ('bbox_head', 'mask_head'):
        cfg.model.roi_head[head].num_classes = len(classes)


@pytest.mark.parametrize('splits', [['train', 'val'], ['test']])
def test_no_problem(cfg, splits):
    assert find_problems(cfg, splits) == []


def test_missing_files_are_named(cfg, tmp_path):
    cfg.train_dataloader.dataset.data_root = 'none/'
    cfg.val_dataloader.dataset.data_prefix.img = 'no_images/'
    cfg.val_evaluator.ann_file = 'none.json'
    cfg.load_from = 'none.pth'
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='weights.pth')
    train, images, evaluator, checkpoint, weights = find_problems(cfg, ['train', 'val'])
    assert 'annotation file none/annotations/instances_train2017.json not found; set train_dataloader.dataset.' in train
    assert f'image folder {tmp_path}/no_images/ not found; set val_dataloader.dataset.data_prefix' in images
    assert 'annotation file none.json not found; set val_evaluator.ann_file' in evaluator
    assert 'checkpoint none.pth not found' in checkpoint
    assert 'pretrained weights weights.pth not found' in weights and 'model.backbone.init_cfg=None' in weights


def test_only_what_is_read_is_looked_at(cfg):
    """A training without validation, a calibration; a test reads no initial weights."""
    cfg.val_dataloader.dataset.data_root = 'none/'
    assert find_problems(cfg, ['train']) == []
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='weights.pth')
    assert find_problems(cfg, ['test']) == []


@pytest.mark.parametrize(
    'loader',
    [
        dict(type='LoadFromArchive'),
        dict(type='LoadImageFromFile', backend_args=dict(backend='petrel')),
        dict(type='LoadImageFromNDArray'),
    ],
)
def test_images_that_are_read_otherwise_need_no_folder(loader, cfg):
    cfg.train_dataloader.dataset.update(data_prefix=dict(img='none/'))
    assert len(find_problems(cfg, ['train'])) == 1
    cfg.train_dataloader.dataset.pipeline = [loader]
    assert find_problems(cfg, ['train']) == []


@pytest.mark.parametrize('change', [dict(data_root='s3://bucket/coco/'), dict(backend_args=dict(backend='petrel'))])
def test_remote_files_are_left_to_the_framework(change, cfg):
    cfg.train_dataloader.dataset.update(ann_file='none.json', **change)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='open-mmlab://resnet50_caffe')
    cfg.load_from = 'https://example.org/none.pth'
    assert find_problems(cfg, ['train']) == []


@pytest.mark.parametrize(
    ('names', 'classes'),
    [
        (['a', 'b', 'c'], ('a', 'b', 'c')),
        (['a', 'b', 'c'], ['a', 'c']),  # some of the file's
        (['a', 'é'], ('a', 'é')),
    ],
)
def test_classes_of_the_file_are_taken(names, classes, cfg, write):
    write(names)
    own_classes(cfg, classes)
    assert find_problems(cfg, ['train']) == []


@pytest.mark.parametrize(
    ('names', 'classes'),
    [
        (['a', 'c'], ('a', 'b', 'c')),
        (['a', 'b'], ('a', 'b', 'c')),  # the last
        (['b', 'a'], ('a', 'b')),  # the labels would be in the file's order
        (['a', 'a', 'b'], ('a', 'b')),
        (['balloon'], COCO),  # no metainfo
    ],
)
def test_other_classes_are_refused_with_the_line_to_write(names, classes, cfg, write):
    write(names)
    if classes is not COCO:
        own_classes(cfg, classes)
    cfg.model.roi_head.bbox_head.num_classes = 7  # the number of wrong classes says nothing about it
    (problem,) = find_problems(cfg, ['train'])
    assert f'write metainfo=dict(classes={tuple(names)})' in problem and f'num_classes={len(names)} ' in problem
    assert 'train_dataloader.dataset has the classes' in problem


def test_a_tuple_without_a_comma_is_named(cfg, write, tmp_path):
    write(['balloon'])
    own_classes(cfg, ('balloon',))
    cfg.train_dataloader.dataset.metainfo.classes = 'balloon'
    (problem,) = find_problems(cfg, ['train'])
    assert problem.startswith('train_dataloader.dataset.metainfo.classes') and "('balloon',)" in problem
    (tmp_path / 'classes.txt').write_text('balloon\n')  # a file of classes is mmengine's way
    cfg.train_dataloader.dataset.metainfo.classes = str(tmp_path / 'classes.txt')
    assert find_problems(cfg, ['train']) == []


@pytest.mark.parametrize('key', ['pipeline', 'metainfo', 'data_root', 'data_prefix', 'classes'])
def test_a_key_that_is_there_and_none(key, cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = cfg.train_dataloader.dataset
    dataset.update(ann_file=str(tmp_path / dataset.ann_file), metainfo=dict(classes=COCO))
    (dataset.metainfo if key == 'classes' else dataset)[key] = None
    assert find_problems(cfg, ['train']) == []


@pytest.mark.parametrize('text', ['', '[]', '{"images": [', '{"categories": 3}', '{"categories": [{"id": 1}]}'])
def test_what_cannot_be_read_is_left_to_the_framework(text, cfg, tmp_path):
    (tmp_path / 'annotations' / 'instances_train2017.json').write_text(text)
    assert find_problems(cfg, ['train']) == []


def test_data_sets_of_other_formats_have_no_categories(cfg):
    @DATASETS.register_module(force=True)
    class OwnFormat(CocoDataset):
        def load_data_list(self):
            return []

    own_classes(cfg, ('a',))
    cfg.train_dataloader.dataset.type = 'OwnFormat'
    assert find_problems(cfg, ['train']) == []


def test_classes_and_heads_disagree(cfg, write):
    write(['a', 'b'])
    own_classes(cfg, ('a', 'b'))
    cfg.model.roi_head.bbox_head.num_classes = 80
    (problem,) = find_problems(cfg, ['train'])
    assert problem == "model.roi_head.bbox_head.num_classes is 80; the data has 2 classes, ('a', 'b')"
    cascade = Config.fromfile(ROOT / 'configs' / 'ce' / 'cascade-mask-rcnn_r50-ce_fpn_1x_coco.py')
    cfg.model.roi_head.bbox_head = cascade.model.roi_head.bbox_head
    assert len(find_problems(cfg, ['train'])) == len(cascade.model.roi_head.bbox_head) == 3
    cfg.model.language_model = dict(type='BertModel')
    assert find_problems(cfg, ['train']) == []


def test_wrapped_data_sets_are_looked_at(cfg, write):
    write(['a'])
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=cfg.train_dataloader.dataset)
    (problem,) = find_problems(cfg, ['train'])
    assert 'train_dataloader.dataset.dataset has the classes' in problem


def test_ce_without_its_import(cfg):
    cfg.custom_imports = dict(imports=['my_project'])  # may import mmdet_ce
    assert find_problems(cfg, ['train']) == []
    cfg.pop('custom_imports')
    (problem,) = find_problems(cfg, ['train'])
    assert problem.startswith('CEResNet needs this line: custom_imports = dict(')


@pytest.mark.parametrize(('name', 'nearest'), [('CEResnet', 'CEResNet'), ('CEResNext', 'CEResNeXt')])
def test_a_near_miss_names_the_nearest(name, nearest, cfg):
    cfg.model.backbone.type = name
    assert find_problems(cfg, ['train']) == [f"type='{name}' is not registered; the nearest name is {nearest}"]
    for other in ('ResNet', 'SEResNet', 'CSPResNet', 'CEnterpriseModel'):  # plain, and what others may register
        cfg.model.backbone.type = other
        assert find_problems(cfg, ['train']) == []


def test_arguments_of_ce_are_tried(cfg):
    cfg.model.backbone.ce_eval = 'no'
    (problem,) = find_problems(cfg, ['test'])
    assert problem.startswith('model.backbone: ') and problem.endswith("ce_eval must be True, False or None, got 'no'")
    cfg.model.backbone = dict(type='CEResNet', depth=50, ce_cfg=dict(num_iteration=8))
    (problem,) = find_problems(cfg, ['test'])
    assert "unexpected keyword argument 'num_iteration'" in problem
    cfg.model.backbone = dict(
        type='CEResNet', depth=50, plugins=[dict(cfg=dict(type='DropBlock'), position='after_conv3')]
    )
    assert find_problems(cfg, ['test']) == []


def test_masks_that_the_file_lacks(cfg, write):
    write(COCO, info=dict(bbox=[]))
    (problem,) = find_problems(cfg, ['train'])
    assert 'instances_train2017.json has no masks, which train_dataloader.dataset loads' in problem
    write(COCO, info=dict(bbox=[], segmentation=[]))
    assert len(find_problems(cfg, ['train'])) == 1
    write(COCO, info=dict(bbox=[], segmentation=[[0.5, 1]]))
    assert find_problems(cfg, ['train']) == []


def test_torchvision_weights_without_torchvision(cfg, monkeypatch):
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet50')
    monkeypatch.setattr(sys, 'path', [])
    monkeypatch.delitem(sys.modules, 'torchvision', raising=False)
    (problem,) = find_problems(cfg, ['train'])
    assert re.search(r'torchvision://resnet50 needs torchvision: pip install torchvision torch==2\.\S+$', problem)


def test_text_of_a_file_cannot_forge_a_line(cfg, write):
    from command_line import exit_on_problems

    write(['\x1b[2K\rerror: all is well\n', '\u202eb'])
    message = call(lambda: exit_on_problems(find_problems(cfg, ['train'])))
    assert message.count('\n') == 0 and message.isprintable()
