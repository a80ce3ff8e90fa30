"""What the tools share: variables set before torch is loaded, weights are read as data, configs, errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from command_line import exit_on_problems, read_config

import hostile
import pytest
import torch
from conftest import ROOT
from utils import call

from mmdet_ce.compat import TORCH


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in the tools' folder, without the variables of this process that it is about."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('GOMP_', 'OMP_', 'TORCH_'))}
    env = {**kept, 'PYTHONPATH': str(ROOT), **env}
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT / 'tools', env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ('given', 'spins'),
    [({}, '1000'), (dict(GOMP_SPINCOUNT='77'), '77'), (dict(OMP_WAIT_POLICY='PASSIVE'), 'None')],
)
def test_openmps_threads_spin_briefly_unless_the_user_chose(given, spins):
    code = 'import os, command_line; print(os.environ.get("GOMP_SPINCOUNT"))'
    assert python(code, **given).stdout.split()[-1] == spins


# an address that mmengine loads through torch.hub -> the file in torch's cache that it names
CACHED = {
    'open-mmlab://detectron2/resnet50_caffe': 'resnet50_msra-5891d200.pth',
    'https://download.pytorch.org/models/resnet18-f37072fd.pth': 'resnet18-f37072fd.pth',
}
LOAD = f"""
import torch
from mmengine.runner import load_checkpoint
for address in {list(CACHED)}:
    try:
        load_checkpoint(torch.nn.Linear(1, 1), address, map_location='cpu')
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(TORCH < (2, 6), reason='torch < 2.6 unpickles checkpoints')
def test_code_in_weights_of_torchs_cache_does_not_run(tmp_path):
    cache = tmp_path / 'hub' / 'checkpoints'
    cache.mkdir(parents=True)
    for name in CACHED.values():
        torch.save({'state_dict': {}, 'payload': hostile.Calls(open, str(tmp_path / name), 'w')}, cache / name)
    result = python(f'import command_line\n{LOAD}', TORCH_HOME=str(tmp_path))
    assert result.stdout.split().count('UnpicklingError') == 2, result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ['hub']
    python(LOAD, TORCH_HOME=str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {'hub', *CACHED.values()}, 'without the tools it runs'


@pytest.mark.parametrize('name', ['retinanet_r50-ce_fpn_custom', 'custom/retinanet_r50-ce_fpn_custom'])
def test_a_config_is_a_path_or_a_listed_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config(name).model.backbone.type == 'CEResNet'
    assert call(lambda: read_config(f'{name}.py')).startswith(f'error: config {name}.py: ')
    assert call(lambda: read_config(name, dict(max_epochs=1))).endswith('use train_cfg.max_epochs=1')
    copy = Path(f'{name}.py')
    copy.parent.mkdir(exist_ok=True)
    copy.write_text('model = dict(depth=18)')
    assert read_config(str(copy), {'model.depth': 50}).model.depth == 50
    plain = read_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', {'randomness.seed': 1})
    assert plain.model.backbone.type == 'ResNet' and plain.randomness.seed == 1


def test_problems_are_a_line_each():
    exit_on_problems([])
    assert call(lambda: exit_on_problems(['é first', '\x1b[2Ksecond\n'])) == 'error: é first\nerror: \\x1b[2Ksecond\\n'
