"""One line for each input that would fail in silence or late; nothing of what trains is refused."""

from __future__ import annotations

import copy
import json
import re
import sys

import annotation_checks
import pytest
import torch
from checks import find_problems, option_problems
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config

from mmdet_ce import CEResNet
from mmdet_ce.__main__ import CONFIGS

pytestmark = pytest.mark.filterwarnings('error:a check before the start failed')
BOX = dict(image_id=1, category_id=1, bbox=[5, 5, 40, 40], area=1600, iscrowd=0, segmentation=[[5, 5, 45, 5, 45, 45]])
FILE = dict(
    categories=[dict(id=1, name='cat'), dict(id=2, name='dog')],
    images=[dict(id=1, file_name='1.png', width=64, height=64)],
    annotations=[dict(BOX, id=1), dict(BOX, id=2, category_id=2)],
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write an annotation file, 'train' or 'val', of FILE with changes, or a text."""
    monkeypatch.chdir(tmp_path)
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        (tmp_path / split / '1.png').touch()

    def call(split='train', text=None, **changes):
        (tmp_path / f'{split}.json').write_text(text or json.dumps({**changes, **FILE, **changes}))

    call('train')
    call('val')
    return call


@pytest.fixture
def cfg(write):
    """The template for masks on a small data set, with no initial weights."""
    cfg = Config.fromfile(CONFIGS / 'custom' / 'mask-rcnn_r50-ce_fpn_custom.py')
    cfg.model.backbone.init_cfg = None
    for split in ('train', 'val'):
        part = cfg[f'{split}_dataloader'].dataset
        part.update(data_root='', ann_file=f'{split}.json', metainfo=dict(classes=('cat', 'dog')))
    cfg.val_evaluator.ann_file = 'val.json'
    return cfg


def changed(key, **changes):
    """Return the entries of FILE under a key, the last with changes; without what is changed to None."""
    *entries, last = copy.deepcopy(FILE[key])
    last.update(changes)
    return {key: [*entries, {name: value for name, value in last.items() if value is not None}]}


def test_no_problem(cfg):
    assert find_problems(cfg, ['train', 'val']) == []
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=cfg.train_dataloader.dataset)
    assert find_problems(cfg, ['train']) == []


def test_a_file_is_read_once(cfg, monkeypatch):
    read = []
    loads = json.loads
    monkeypatch.setattr(json, 'loads', lambda text, **kwargs: read.append(text) or loads(text, **kwargs))
    assert find_problems(cfg, ['train', 'val']) == []
    assert len(read) == 2


def test_missing_files_are_named(cfg, tmp_path):
    cfg.train_dataloader.dataset.data_root = 'none/'
    cfg.val_dataloader.dataset.data_prefix.img = 'no_images/'
    cfg.val_evaluator.ann_file = 'none.json'
    cfg.load_from = 'none.pth'
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='weights.pth')
    train, images, evaluator, checkpoint, weights = find_problems(cfg, ['train', 'val'])
    assert 'annotation file none/train.json not found; set train_dataloader.dataset.ann_file' in train
    assert 'image folder no_images/ not found; set val_dataloader.dataset.data_prefix' in images
    assert 'annotation file none.json not found; set val_evaluator.ann_file' in evaluator
    assert 'checkpoint none.pth not found' in checkpoint
    assert 'pretrained weights weights.pth not found' in weights and 'model.backbone.init_cfg=None' in weights
    (weights,) = {*find_problems(cfg, ['train'])} - {train, checkpoint}  # no validation, no look at its files
    cfg.load_from = None
    assert find_problems(cfg, []) == [], 'a test does not read initial weights'


@pytest.mark.parametrize(
    'change',
    [dict(data_root='s3://bucket/'), dict(backend_args=dict(backend='petrel')), dict(type='OwnFormat')],
)
def test_what_others_read_is_left_to_them(change, cfg, write):
    @DATASETS.register_module(force=True)
    class OwnFormat(CocoDataset):
        def load_data_list(self):
            return []

    write(text='no JSON')
    cfg.train_dataloader.dataset.update(change)
    assert find_problems(cfg, ['train']) == []


@pytest.mark.parametrize(
    'text, fault',
    [
        (json.dumps(FILE)[:-40], r"not valid JSON \(.*\)\. It begins with '{.categories"),
        (' ', r"not valid JSON \(Expecting value.* begins with ' '"),
        ('<annotation>', "begins with '<annotation>'"),
        ('[]', "not in COCO's format"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(text, fault, cfg, write):
    write(text=text)
    (problem,) = find_problems(cfg, ['train'])
    assert problem.startswith('train.json is ') and re.search(fault, problem)


@pytest.mark.parametrize(
    'changes, fault',
    [
        (dict(images=[]), '0 images and 2 annotations'),
        (changed('annotations', bbox=[0.1, 0.1, 0.5, 0.5]), None),  # one of two boxes is used
        (dict(annotations=[dict(BOX, id=1, bbox=[0.1, 0.1, 0.5, 0.5])]), 'can use none'),
        (changed('annotations', category_id=3), '1 of its 2 annotations have a category_id .*, like 3; .* have .1, 2'),
        (changed('images', width=None), "without 'width'"),
        (changed('images', width='64'), "not in COCO's format: TypeError"),
        (changed('annotations', segmentation=None), r'no masks for 1 of its 2 boxes, .* \(with_mask=True\)'),
        (dict(annotations=[dict(BOX, id=1, bbox=[40, 5, 60, 9])]), '1 of its 1 boxes leave their images'),
        (changed('images', file_name='train/1.png'), 'image train/train/1.png, not found. Correct its file_name'),
    ],
)
def test_content_that_mmdet_cannot_use_is_named(changes, fault, cfg, write):
    write(**changes)
    problems = find_problems(cfg, ['train'])
    assert len(problems) == bool(fault) and all(re.search(f'train.json.*{fault}', problem) for problem in problems)


@pytest.mark.parametrize(
    'changes, fault',
    [
        (changed('annotations', iscrowd=None), "annotations without 'iscrowd'"),
        (changed('annotations', id=0), 'an annotation with id 0'),
        (changed('images', file_name='2.png'), 'other images than val_dataloader'),
        (dict(annotations=[]), None),  # of a test without labels
    ],
)
def test_what_an_evaluation_needs(changes, fault, cfg, write):
    write('own', **changes)
    cfg.val_evaluator.ann_file = 'own.json'
    problems = find_problems(cfg, ['val'])
    assert [fault in problem for problem in problems] == [True] * bool(fault)
    cfg.val_evaluator.type = 'VOCMetric'
    assert find_problems(cfg, ['val']) == []


def test_each_data_set_may_have_its_evaluator(cfg, write):
    write('train', **changed('images', file_name='../val/1.png'))
    first = cfg.val_dataloader.dataset
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[first, {**first, 'ann_file': 'train.json'}])
    files = ('val.json', 'train.json', 'https://example.org/val.json')
    cfg.val_evaluator = [{**cfg.val_evaluator, 'ann_file': file} for file in files]
    assert find_problems(cfg, ['val']) == []


@pytest.mark.parametrize('info', [dict(), dict(categories=['cat']), dict(categories=[dict(id=1, name='horse')])])
def test_of_a_large_file_the_categories_alone_are_read(info, cfg, write, monkeypatch):
    monkeypatch.setattr(annotation_checks, 'LARGE', 100)
    write(info=info, images=[])
    assert find_problems(cfg, ['train']) == []
    if not isinstance(info.get('categories', [''])[0], dict):  # else it is not clear which they are
        cfg.train_dataloader.dataset.metainfo.classes = ('dog', 'cat')
        assert len(find_problems(cfg, ['train'])) == 1


@pytest.mark.parametrize(
    'names, classes, fault',
    [
        (['a', 'b', 'c'], ['a', 'c'], None),  # some of the file's
        (['a', 'b'], ('b', 'a'), r"in this order: \['a', 'b'\]\. Write metainfo=dict\(classes=\('a', 'b'\)\)"),
        (['cat', 'dog'], ('dgo', 'cat'), r"class 'dgo', .* 'dog'\. Write .*\('cat', 'dog'\).*num_classes=2 "),
        ([f'{i} x' for i in range(80)] + ['bicycle'], ('bycicle',), r"nearest .* 'bicycle'.*\('bicycle',\)"),
        ([f'{i} x' for i in range(80)], ('first', 'second'), r'train.json has 80, .*Write names of the file'),
        (
            ['balloon'],
            None,
            r"Write metainfo=dict\(classes=\('balloon',\)\), and num_classes=1 ",
        ),  # COCO's are the default
        (['a', 'a', 'b'], ('a', 'b'), r"has 3, in this order: \['a', 'a', 'b'\]"),
        (['balloon'], 'balloon', r"the text 'balloon' as classes; expected a tuple, \('balloon',\)"),
    ],
)
def test_classes_are_names_of_the_file_in_its_order(names, classes, fault, cfg, write):
    write(categories=[dict(id=1 + i, name=name) for i, name in enumerate(names)], annotations=[dict(BOX, id=1)])
    cfg.train_dataloader.dataset.metainfo = dict(classes=classes) if classes else None
    for head in ('bbox_head', 'mask_head'):  # of wrong classes the number says nothing
        cfg.model.roi_head[head].num_classes = len(classes) if fault is None else 7
    problems = find_problems(cfg, ['train'])
    assert len(problems) == bool(fault) and all(re.search(fault, text) and len(text) < 300 for text in problems)


@pytest.mark.parametrize('names', [['cat'], ['dog']])
def test_a_category_that_one_of_two_files_lacks(names, cfg, write):
    write('val', categories=[dict(id=1, name=names[0])], annotations=[dict(BOX, id=1)])
    first = cfg.train_dataloader.dataset
    second = {**first, 'ann_file': 'val.json', 'data_prefix': dict(img='val/')}
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[first, second])
    (problem,) = find_problems(cfg, ['train'])
    assert re.match(r"val.json lacks the category '(cat|dog)' .*; add the missing category to that file", problem)


def test_honest_configs_that_look_like_others(cfg, write):
    """A loader named like mmcv's, a data set without classes of its own, an unlabelled part, class-agnostic masks."""

    @TRANSFORMS.register_module(force=True)
    class GeoLoadImageFromFile(LoadImageFromFile):
        pass

    @DATASETS.register_module(force=True)
    class NoClasses(CocoDataset):
        METAINFO = dict()

    part = cfg.train_dataloader.dataset
    part.pipeline[0].type = 'GeoLoadImageFromFile'
    part.data_prefix.img = 'elsewhere/'
    part.type = 'NoClasses'
    cfg.model.roi_head.mask_head.update(num_classes=80, class_agnostic=True)
    assert find_problems(cfg, ['train']) == []
    part.pipeline[1].type = 'LoadEmptyAnnotations'
    part.filter_cfg = None
    for categories in ([], [dict(id=1, name='object')]):
        write(categories=categories, annotations=[])
        assert find_problems(cfg, ['train']) == []


@pytest.mark.filterwarnings('default:a check before the start failed')
@pytest.mark.parametrize('change', [dict(data_prefix=None), dict(clases=('cat',))])
def test_a_check_that_fails_stops_nothing(change, cfg):
    cfg.train_dataloader.dataset.update(change)
    with pytest.warns(UserWarning, match='is left out'):
        assert find_problems(cfg, ['train']) == []


def test_heads_have_the_number_of_classes(cfg):
    cfg.model.roi_head.bbox_head.num_classes = 80
    (problem,) = find_problems(cfg, ['train'])
    assert problem == "model.roi_head.bbox_head.num_classes is 80; the data has 2 classes, ('cat', 'dog')"
    cfg.model.roi_head.bbox_head = [cfg.model.roi_head.bbox_head] * 3  # as in a cascade
    assert len(find_problems(cfg, ['train'])) == 3
    cfg.model.language_model = dict(type='BertModel')
    assert find_problems(cfg, ['train']) == []


def test_arguments_of_ce(cfg):
    cfg.model.backbone.ce_evall = True
    assert "no argument 'ce_evall'; did you mean 'ce_eval'?" in find_problems(cfg, [])[0]
    del cfg.model.backbone['ce_evall']
    cfg.model.backbone.ce_cfg = dict(num_iteration=8)
    assert "unexpected keyword argument 'num_iteration'" in find_problems(cfg, [])[0]


@pytest.mark.parametrize(
    'change, layers',
    [
        (dict(norm_eval=True), 14),
        (dict(frozen_stages=1), 4),
        (dict(norm_eval=True, init_cfg=dict(type='Pretrained', checkpoint='https://download.pytorch.org/r.pth')), 14),
        (dict(norm_eval=True, init_cfg=dict(type='Pretrained', checkpoint='plain.pth')), 14),
        (dict(norm_eval=True, init_cfg=dict(type='Pretrained', checkpoint='ce.pth')), 0),
        (dict(norm_eval=True, init_cfg=dict(type='Pretrained', checkpoint='https://example.org/ce.pth')), 0),
        (dict(norm_eval=True, ce_cfg=dict(identity_start=True)), 0),
        (dict(norm_eval=True, ce_eval=False), 0),
    ],
)
def test_ce_in_evaluation_needs_statistics(change, layers, cfg):
    for name, ce_cfg in (('ce', dict(num_channels=16)), ('plain', None)):
        torch.save(dict(state_dict=CEResNet(depth=18, ce_cfg=ce_cfg).state_dict()), f'{name}.pth')
    cfg.model.backbone.update(change)
    problems = find_problems(cfg, ['train'])
    assert len(problems) == bool(layers)
    if layers:
        assert f'model.backbone: {layers} CE layers, like ce1, would be evaluated' in problems[0]
        for ways in (dict(load_from='ce.pth'), dict(resume=True), dict(custom_hooks=[dict(type='CECalibrationHook')])):
            assert find_problems(Config({**cfg.to_dict(), **ways}), ['train']) == []
    assert find_problems(cfg, []) == []


@pytest.mark.parametrize(
    'option, use',
    [
        ('max_epochs', 'train_cfg.max_epochs=7'),
        ('batch_size', 'train_dataloader.batch_size=7 val_dataloader.batch_size=7 test_dataloader.batch_size=7'),
        ('train.ann_file', 'train_dataloader.dataset.ann_file=7'),
        ('num_classes', 'model.roi_head.bbox_head.num_classes=7 model.roi_head.mask_head.num_classes=7'),
        ('train_cfg.max_epochs', None),
        ('tta_model.tta_cfg.max_per_img', None),  # mmdet's test reads it
        ('own_setting', None),
    ],
)
def test_an_option_that_nothing_reads(option, use):
    cfg = Config.fromfile(CONFIGS / 'custom' / 'mask-rcnn_r50-ce_fpn_custom.py')
    problems = option_problems(cfg, {option: 7})
    assert problems == ([f'nothing reads the option {option}; use {use}'] if use else [])


def test_torchvision_weights_without_torchvision(cfg, monkeypatch):
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet50')
    monkeypatch.setattr(sys, 'path', [])
    monkeypatch.delitem(sys.modules, 'torchvision', raising=False)
    (problem,) = find_problems(cfg, ['train'])
    assert re.search(r'^torchvision://resnet50 needs torchvision.* model\.backbone\.init_cfg\.checkpoint$', problem)
