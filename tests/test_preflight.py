"""One clear sentence for each input that is not there."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import ROOT
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config

from mmdet_ce.preflight import find_problems

CONFIG = ROOT / 'configs' / 'ce' / 'mask-rcnn_r50-ce_fpn_1x_coco.py'


@pytest.fixture
def cfg(tmp_path):
    """The shipped config on a data set of one (empty) image, with no initial weights."""
    coco = dict(
        images=[dict(id=1, file_name='1.jpg', width=64, height=64)],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)],
        categories=[dict(id=1 + i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])],
    )
    (tmp_path / 'annotations').mkdir()
    for split in ('train', 'val'):
        (tmp_path / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(coco))
        (tmp_path / f'{split}2017').mkdir()
        (tmp_path / f'{split}2017' / '1.jpg').touch()
    cfg = Config.fromfile(CONFIG)
    for name in ('train', 'val', 'test'):
        cfg[f'{name}_dataloader'].dataset.data_root = str(tmp_path)
    for name in ('val', 'test'):
        cfg[f'{name}_evaluator'].ann_file = str(tmp_path / 'annotations' / 'instances_val2017.json')
    cfg.model.backbone.init_cfg = None
    return cfg


@pytest.mark.parametrize('split', ['train', 'test'])
def test_no_problem(cfg, split):
    assert find_problems(cfg, split) == []


def test_missing_data_root(cfg):
    cfg.train_dataloader.dataset.data_root = 'no/such/folder/'
    assert find_problems(cfg, 'train') == [
        'data root no/such/folder/ does not exist (train_dataloader.dataset.data_root); set it to the folder that '
        'holds the data set'
    ]


def test_missing_annotation_file_and_images(cfg, tmp_path):
    cfg.val_dataloader.dataset.ann_file = 'annotations/none.json'
    cfg.val_dataloader.dataset.data_prefix.img = 'none/'
    cfg.val_evaluator.ann_file = 'none.json'
    ann, images, evaluator = find_problems(cfg, 'train')
    assert f'{tmp_path}/annotations/none.json not found (val_dataloader.dataset.ann_file' in ann
    assert f'image folder {tmp_path}/none not found (val_dataloader.dataset.data_prefix.img' in images
    assert 'annotation file none.json not found; set val_evaluator.ann_file' in evaluator


def without(key):
    return lambda coco: coco.pop(key)


@pytest.mark.parametrize(
    'change, message',
    [
        ('', r'cannot be read \(JSONDecodeError: Expecting value'),
        ('{"images": [', r'cannot be read \(JSONDecodeError: Expecting value'),
        ('[]', r'cannot be read \(AssertionError: annotation file format <class .list.> not supported\)'),
        (without('categories'), r"cannot be read \(KeyError: 'categories'\)"),
        (without('images'), 'leaves no image; each needs an object of a known class'),
        (without('annotations'), 'leaves no image; each needs an object of a known class'),
        (lambda coco: coco['annotations'].clear(), 'leaves no image; each needs an object of a known class'),
        (lambda coco: coco['annotations'][0].update(category_id=99), 'leaves no image; each needs an object'),
        (lambda coco: coco['images'][0].update(width=1), 'leaves no image; .* and the size that filter_cfg asks for'),
        (lambda coco: coco['annotations'][0].pop('bbox'), r"cannot be read \(KeyError: 'bbox'\)"),
        (lambda coco: coco['images'][0].pop('width'), r"cannot be read \(KeyError: 'width'\)"),
        (lambda coco: coco['categories'][0].update(name='disc'), 'has categories for 79 of the 80 classes .*metainfo'),
        (lambda coco: coco['images'][0].update(file_name='2.jpg'), r'2.jpg, the first image of .*, not found; set '),
    ],
)
def test_unusable_annotations(change, message, cfg, tmp_path, capsys):
    path = tmp_path / 'annotations' / 'instances_train2017.json'
    if callable(change):
        coco = json.loads(path.read_text())
        change(coco)
        change = json.dumps(coco)
    path.write_text(change)
    (problem,) = find_problems(cfg, 'train')
    assert re.search(message, problem) and f'annotation file {path} (train_dataloader' in problem
    assert '\n' not in problem and not capsys.readouterr().out


def test_a_class_at_the_end_may_be_missing(cfg, tmp_path):
    """The framework numbers the others as the config does."""
    path = tmp_path / 'annotations' / 'instances_train2017.json'
    coco = json.loads(path.read_text())
    coco['categories'].pop()
    path.write_text(json.dumps(coco))
    assert find_problems(cfg, 'train') == []


def test_data_sets_that_are_read_otherwise(cfg):
    @DATASETS.register_module(force=True)
    class OwnFormat(CocoDataset):
        METAINFO = {}

        def load_data_list(self):
            return [dict(img_id=0, width=64, height=64, instances=[dict(bbox=[0, 0, 9, 9])])]

    cfg.train_dataloader.dataset.lazy_init = True
    cfg.val_dataloader.dataset.type = 'OwnFormat'
    assert find_problems(cfg, 'train') == []


def test_large_annotation_files_are_looked_at_from_both_ends(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr('mmdet_ce.preflight.MAX_READ', 100)
    path = tmp_path / 'annotations' / 'instances_train2017.json'
    text = path.read_text()
    path.write_text(f'\n{text}\n')
    assert find_problems(cfg, 'train') == []
    for part in (text[:-1], text[1:], text[:150]):
        path.write_text(part)
        (problem,) = find_problems(cfg, 'train')
        assert 'is incomplete or no JSON' in problem


def test_missing_checkpoints(cfg):
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='none.pth')
    resume, pretrained = find_problems(cfg, 'train', 'epoch_9.pth')
    assert resume.startswith('checkpoint epoch_9.pth not found')
    assert pretrained.startswith('pretrained weights none.pth not found') and 'init_cfg=None' in pretrained
    assert len(find_problems(cfg, 'test')) == 0, 'a test does not read the initial weights'


def test_truncated_checkpoints(cfg, tmp_path):
    meta = dict(epoch=1, iter=10)
    torch.save({'state_dict': {'w': torch.zeros(1000)}, 'meta': meta}, tmp_path / 'whole.pth')
    data = (tmp_path / 'whole.pth').read_bytes()
    for name, content, what in (
        ('part.pth', data[: len(data) // 2], 'is incomplete'),
        ('empty.pth', b'', 'is empty'),
        ('text.pth', b'epoch_12', 'is incomplete, damaged or no checkpoint'),
    ):
        (tmp_path / name).write_bytes(content)
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / name))
        checkpoint, pretrained = find_problems(cfg, 'train', str(tmp_path / name))
        assert checkpoint.startswith('checkpoint ') and pretrained.startswith('pretrained weights')
        assert all(f'{name} {what}' in problem for problem in (checkpoint, pretrained))
    cfg.model.backbone.init_cfg = None
    assert find_problems(cfg, 'train', str(tmp_path / 'whole.pth')) == []
    cfg.load_from = 'none.pth'
    assert 'checkpoint none.pth not found' in find_problems(cfg, 'train')[0]
    assert find_problems(cfg, 'test') == []


def test_remote_files_are_left_to_the_framework(cfg):
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet50')
    cfg.train_dataloader.dataset.data_root = 's3://bucket/coco/'
    assert find_problems(cfg, 'train') == []


def test_missing_custom_imports(cfg):
    cfg.pop('custom_imports')
    (problem,) = find_problems(cfg, 'train')
    assert 'uses CEResNet but does not import mmdet_ce' in problem
    assert "custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)" in problem


def test_no_false_alarms(cfg):
    """A user's own module may import mmdet_ce; a file backend may map paths; mmpretrain has other prefixes."""
    cfg.custom_imports.imports = ['my_project']
    cfg.val_evaluator.update(ann_file='none.json', backend_args=dict(backend='petrel'))
    cfg.train_dataloader.dataset.update(type='ImageNet', data_prefix='train2017/')
    cfg.val_dataloader.dataset.update(type='ImageNet', data_prefix=dict(img=None))
    assert find_problems(cfg, 'train') == []


def test_wrapped_dataset(cfg):
    inner = cfg.train_dataloader.dataset
    inner.data_root = 'none/'
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=inner)
    assert ['data root none/' in p for p in find_problems(cfg, 'train')] == [True]
