"""One clear sentence for each input that is not there."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config

from mmdet_ce.preflight import find_problems

CONFIG = ROOT / 'configs' / 'ce' / 'mask-rcnn_r50-ce_fpn_1x_coco.py'


@pytest.fixture
def cfg(tmp_path):
    """The shipped config on a data set of one (empty) image, with no initial weights."""
    coco = dict(
        images=[dict(id=1, file_name='1.jpg', width=64, height=64)],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)],
        categories=[dict(id=1, name='person')],
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


def test_missing_checkpoints(cfg):
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='none.pth')
    resume, pretrained = find_problems(cfg, 'train', 'epoch_9.pth')
    assert resume.startswith('checkpoint epoch_9.pth not found')
    assert pretrained.startswith('pretrained weights none.pth not found') and 'init_cfg=None' in pretrained
    assert len(find_problems(cfg, 'test')) == 0, 'a test does not read the initial weights'


def test_truncated_checkpoints(cfg, tmp_path):
    torch.save({'w': torch.zeros(1000)}, tmp_path / 'whole.pth')
    data = (tmp_path / 'whole.pth').read_bytes()
    for name, content, what in (
        ('part.pth', data[: len(data) // 2], 'is incomplete'),
        ('empty.pth', b'', 'is empty'),
        ('text.pth', b'epoch_12', 'is not a checkpoint'),
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
