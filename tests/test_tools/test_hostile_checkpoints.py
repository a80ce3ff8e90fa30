"""In the tools' processes a hostile file does not run, from torch's cache either."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hostile
import mmengine
import pytest
import torch
from conftest import ROOT

from mmdet_ce.compat import TORCH

CODE = """
import os, pickle, sys
import command_line, mmdet_ce
from mmengine.runner import CheckpointLoader
try:
    CheckpointLoader.load_checkpoint(sys.argv[1], logger='silent')
except pickle.UnpicklingError:
    print('refused', os.path.exists(sys.argv[2]))
del os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD']
CheckpointLoader.load_checkpoint(sys.argv[1], logger='silent')
print('loaded', os.path.exists(sys.argv[2]))
"""
ADDRESS = 'detectron2/resnet50_caffe'


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 6), reason='torch < 2.6 unpickles checkpoints')
def test_a_file_in_the_cache_of_torch_hub(tmp_path):
    """mmengine loads open-mmlab:// and torchvision:// through torch.hub, which unpickles unless it is told not to."""
    urls = json.loads((Path(mmengine.__file__).parent / 'hub' / 'openmmlab.json').read_text())
    cached = tmp_path / 'hub' / 'checkpoints' / Path(urls[ADDRESS]).name
    cached.parent.mkdir(parents=True)
    marker = tmp_path / 'marker'
    torch.save({'state_dict': {}, 'payload': hostile.live(marker)['os.system']}, cached)
    env = dict(PATH='/usr/bin:/bin', TORCH_HOME=str(tmp_path), PYTHONPATH=f'{ROOT / "tools"}:{ROOT}')
    command = [sys.executable, '-W', 'ignore', '-c', CODE, f'open-mmlab://{ADDRESS}', marker]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.stdout.splitlines()[-2:] == ['refused False', 'loaded True'], result.stderr
