"""The analysis tool in process, on a tiny shapes data set: what it prints and writes."""

from __future__ import annotations

import json

import analyze_channels
import numpy as np
import pytest
import torch
from conftest import ROOT
from make_shapes_dataset import make_dataset
from mmdet.registry import MODELS
from mmengine.config import Config
from utils import call, randomize

pytestmark = pytest.mark.slow

CE = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18-ce_fpn_8e_shapes.py'
PLAIN = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18_fpn_8e_shapes.py'
SMALL = ['--cfg-options', 'model.backbone.base_channels=16', 'model.neck.in_channels=[16,32,64,128]']
SMALL += ['test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('work')
    make_dataset(folder / 'data' / 'shapes', train=1, val=3)
    for name, path in (('plain', PLAIN), ('ce', CE)):
        cfg = Config.fromfile(path)
        cfg.model.backbone.base_channels = 16
        cfg.model.neck.in_channels = [16, 32, 64, 128]
        detector = MODELS.build(cfg.model)
        randomize(detector.backbone)
        torch.save(dict(state_dict=detector.state_dict()), folder / f'{name}.pth')
    return folder


def test_plain_against_ce(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    models = ['--model', 'without', PLAIN, 'plain.pth', '--model', 'with', CE, 'ce.pth']
    assert call(analyze_channels.main, *models, '--num-images', 2, '--out', 'both/channels.json', *SMALL) is None
    record = json.loads((folder / 'both' / 'channels.json').read_text())
    assert record['with'].keys() == record['without'].keys() and 'backbone.bn1' in record['with']
    ce = [row for row in record['with'].values() if 'lambda' in row]
    assert len(ce) == 7
    for row in record['with'].values():
        contribution = np.array(row['contribution'])
        assert row['inhibited'] == (contribution <= 0.05 * contribution.mean()).mean()
    header, _, *rows, written = capsys.readouterr().out.strip().splitlines()[-7:]
    assert written == 'written: both/channels.json'
    cells = [dict(zip(header.split(' | ')[2:], row.strip(' |').split(' | ')[2:])) for row in rows]
    inhibited = np.average([row['inhibited'] for row in ce], weights=[row['channels'] for row in ce])
    assert cells[1]['inhibited'] == f'{inhibited:.1%}'
    assert cells[1]['lambda'] == f'{np.mean([row["lambda"] for row in ce]):.3f}'


def test_the_checkpoint_of_another_model_is_refused(folder, monkeypatch):
    """Also where the config names no scope."""
    monkeypatch.chdir(folder)
    (folder / 'no_scope.py').write_text(f"_base_ = '{PLAIN}'\ndefault_scope = None\n")
    with pytest.raises(RuntimeError, match='nexpected key'):
        call(analyze_channels.main, '--model', 'a', 'no_scope.py', 'ce.pth', *SMALL)
