"""ImageNet training with mmpretrain's own tools, from images to a detector. Each run is a process."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import cv2
import mmengine
import pytest
import torch
from conftest import ROOT
from make_shapes_dataset import make_dataset
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version
from tool_runs import output, run

from mmdet_ce import CEResNet

pytestmark = pytest.mark.slow

CONFIGS = ROOT / 'configs' / 'imagenet'
# torchvision's wheel registers its kernels for these two; beside a CPU build of torch nobody has declared them.
DECLARE_OPERATORS = """
import torch
for name in ('nms', 'qnms'):
    torch.library.define(f'torchvision::{name}', '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
"""
# The shipped config on a folder with one sub-folder of images a class, small enough for a CPU.
CONFIG = """
_base_ = '{base}'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
dataset = dict(_delete_=True, type='CustomDataset', data_root='{data}', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(48, 48)), dict(type='PackInputs')])
train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
model = dict(head=dict(num_classes=4, topk=(1, )))
data_preprocessor = dict(num_classes=4)
val_evaluator = dict(topk=(1, ))
test_evaluator = val_evaluator
param_scheduler = []
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=5e-4))
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
"""


@pytest.fixture(scope='module')
def env(tmp_path_factory):
    """The environment variables that put mmpretrain on the path."""
    if digit_version(mmengine.__version__) < digit_version('0.8.3'):
        pytest.skip(f'mmpretrain 1.2 needs mmengine 0.8.3: {mmengine.__version__}')
    folder = Path(sys.prefix) / 'imagenet'
    if not folder.is_dir():
        pytest.skip(f'mmpretrain is not in {folder} (make test)')
    site = tmp_path_factory.mktemp('site')
    if torch.version.cuda is None:
        (site / 'sitecustomize.py').write_text(DECLARE_OPERATORS)
    return dict(PYTHONPATH=f'{site}{os.pathsep}{folder}')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Objects cut from generated images, a folder for each of the four classes."""
    folder = tmp_path_factory.mktemp('images')
    make_dataset(folder / 'shapes', train=24, val=1)
    annotations = json.loads((folder / 'shapes' / 'annotations' / 'instances_train.json').read_text())
    files = {image['id']: image['file_name'] for image in annotations['images']}
    for annotation in annotations['annotations']:
        x, y, w, h = map(round, annotation['bbox'])
        cut = cv2.imread(str(folder / 'shapes' / 'train' / files[annotation['image_id']]))[y : y + h, x : x + w]
        place = folder / 'classes' / str(annotation['category_id'])
        place.mkdir(parents=True, exist_ok=True)
        if cut.size and len(list(place.iterdir())) < 16:
            assert cv2.imwrite(str(place / f'{annotation["id"]}.png'), cut)
    return folder / 'classes'


@pytest.mark.parametrize('name, epochs', [('resnet18-ce_1xb128_tiny-imagenet', 4), ('resnet50-ce_8xb32_in1k', 1)])
def test_trains_and_moves_to_a_detector(name, epochs, env, images, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.format(base=CONFIGS / f'{name}.py', data=images))
    options = [f'train_cfg.max_epochs={epochs}', f'train_cfg.val_interval={epochs}']
    text = output(run(ROOT / 'tools' / 'train.py', config, '--work-dir', 'run', options=options, cwd=tmp_path, **env))
    losses = [float(loss) for loss in re.findall(r'Epoch\(train\).* loss: (\S+)', text)]
    assert len(losses) == 8 * epochs
    assert epochs == 1 or sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses
    assert re.search(r'accuracy/top1: \d', text)

    checkpoint = tmp_path / 'run' / f'epoch_{epochs}.pth'
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint), prefix='backbone.')
    size = dict(depth=18, base_channels=32) if 'resnet18' in name else dict(depth=50)
    backbone = CEResNet(init_cfg=init_cfg, **size)
    backbone.init_weights()
    trained = CheckpointLoader.load_checkpoint(str(checkpoint), 'cpu')['state_dict']
    assert {f'backbone.{key}' for key in backbone.state_dict()} == {k for k in trained if k.startswith('backbone.')}
    assert all(torch.equal(value, trained[f'backbone.{key}']) for key, value in backbone.state_dict().items())
    assert not any(ce.lacks_statistics for _, ce in backbone.named_ce())
