"""tools/compare_seeds.py: it trains once, continues what was killed, and refuses what is another training."""

from __future__ import annotations

import json
import re

import compare_seeds
import pytest
from conftest import ROOT
from make_shapes_dataset import make_dataset
from tool_runs import SMALL
from utils import call

pytestmark = pytest.mark.slow
PLAIN = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18_fpn_8e_shapes.py'


def test_compare_seeds(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / 'data' / 'shapes', train=8, val=4)
    options = [*SMALL, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=4']
    options += ['default_hooks.logger.interval=1']
    arguments = ['--run', 'plain', PLAIN, 'model.backbone.depth=18', '--seeds', 0, '--out-dir', 'comparison']
    assert call(compare_seeds.main, *arguments, '--cfg-options', *options) is None
    text = capfd.readouterr().out
    assert 'plain, seed 0: ' in text and 'bbox_mAP' in text and 's/iteration' in text
    results = json.loads((tmp_path / 'comparison' / 'results.json').read_text())
    assert list(results['runs']) == ['plain'] and len(results['runs']['plain']) == 1
    assert results['seconds_per_iteration']['plain'][0] > 0
    assert (tmp_path / 'comparison' / 'comparison.png').stat().st_size > 5_000
    assert (tmp_path / 'comparison' / 'curves.png').stat().st_size > 5_000
    seed = tmp_path / 'comparison' / 'plain' / 'seed_0'
    trained = (seed / 'epoch_1.pth').stat().st_mtime_ns

    # Done, also as earlier versions wrote it, in another clone: not run again.
    saved = json.loads((seed / 'comparison.json').read_text())
    saved['identity']['command'][0] = '/another/clone/tools/train.py'
    (seed / 'comparison.json').write_text(json.dumps({key: saved[key] for key in ('identity', 'metrics')}))
    log = (seed / 'output.txt').read_text()
    assert call(compare_seeds.main, *arguments, '--cfg-options', *options) is None
    assert (seed / 'output.txt').read_text() == log

    # Killed after the last checkpoint: it is tested.
    (seed / 'comparison.json').write_text(json.dumps({**saved, 'metrics': {}}))
    (scalars,) = seed.glob('*/vis_data/scalars.json')
    scalars.write_text(''.join(line for line in scalars.read_text().splitlines(True) if 'coco/' not in line))
    assert call(compare_seeds.main, *arguments, '--cfg-options', *options) is None
    assert json.loads((seed / 'comparison.json').read_text())['metrics'] == saved['metrics']
    assert (seed / 'epoch_1.pth').stat().st_mtime_ns == trained

    # Another training: neither continued nor written over.
    message = call(compare_seeds.main, *arguments, '--cfg-options', *options, 'optim_wrapper.optimizer.lr=1e-5')
    assert re.fullmatch('error: comparison/plain/seed_0 holds a training of [^\n]+', message)
    assert (seed / 'epoch_1.pth').stat().st_mtime_ns == trained
