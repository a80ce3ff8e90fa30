"""How the demo tells what a training does, and how it fails; a whole one is run in test_train_and_test.py."""

from __future__ import annotations

import demo
import pytest
from conftest import ROOT
from utils import call

TRAIN_LINE = (
    '2026/11/25 03:31:00 - mmengine - INFO - Epoch(train)  [{epoch}][{iteration:3}/100]  base_lr: 1.0e-03 lr: 1.0e-03  '
    'eta: {eta}  time: 0.3998  data_time: 0.0100  grad_norm: 2.1  loss: {loss:.4f}  loss_rpn_cls: 0.6931  acc: 9.0\n'
)


@pytest.mark.parametrize('eta', ['0:05:10', '1 day, 0:05:10'])
def test_progress_is_found_in_the_line_of_a_training(eta):
    match = demo.PROGRESS.search(TRAIN_LINE.format(epoch=1, iteration=10, loss=2.5, eta=eta))
    assert match.group(1, 4, 2) == ('[1][ 10/100]', 'loss: 2.5000', f'eta: {eta}')


@pytest.mark.slow
def test_a_training_that_fails_ends_the_demo_with_its_message(tmp_path, monkeypatch, capsys):
    config = tmp_path / 'broken.py'
    config.write_text(f"_base_ = '{ROOT / demo.CONFIG}'\ntrain_dataloader = dict(dataset=dict(data_root='none'))\n")
    (tmp_path / 'data' / 'shapes').mkdir(parents=True)
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, 'TOOLS', tmp_path / 'tools')
    monkeypatch.setattr(demo, 'CONFIG', config)
    assert call(demo.main, '--work-dir', 'run') == 1
    printed = capsys.readouterr()
    assert printed.out.count('$ python tools/') == 1, 'nothing is run after it'
    assert 'error: annotation file none/annotations/' in printed.err
    assert 'its whole output: run/output.txt' in printed.err
