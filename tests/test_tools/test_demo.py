"""How the demo fails; a whole one is run in test_train_and_test.py."""

from __future__ import annotations

import demo
import pytest
from conftest import ROOT
from utils import call


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
