"""tools/compare.py trains once, continues what was begun, refuses another config, and draws up the results."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import compare
import pytest
from conftest import ROOT
from make_shapes_dataset import make_dataset
from tool_runs import SMALL
from utils import call, wait_until

PLAIN = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18_fpn_8e_shapes.py'


def test_the_command_line_and_all_inputs_are_checked_before_the_first_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(compare.main) == 2 and call(compare.main, PLAIN, PLAIN) == 2 and call(compare.main, '--run', 'a') == 2
    assert call(compare.main, PLAIN, '--cfg-options', 'foo') == 2 and 'KEY=VALUE, got foo' in capsys.readouterr().err
    message = call(compare.main, PLAIN, '--run', 'b', PLAIN, 'train_dataloader.dataset.ann_file=b.json')
    assert 'b.json not found' in message and all(line.startswith('error: ') for line in message.splitlines())
    assert not any(tmp_path.iterdir())


def result(run: str, seed: int, environment: str = 'commit a', **metrics: float) -> dict:
    return dict(run=run, seed=seed, seconds_per_iteration=0.25, environment=environment, metrics=metrics)


def test_table_has_mean_and_spread():
    results = [result('plain', 0, bbox_mAP=0.4, bbox_mAP_s=0.1), result('plain', 1, 'commit b', bbox_mAP=0.5)]
    lines = compare.table([*results, result('ce', 0, bbox_mAP=0.6, segm_mAP=0.3)]).splitlines()
    assert lines[0] == '| | bbox_mAP | segm_mAP | seconds an iteration |'
    assert lines[2] == '| plain | 0.450 ± 0.071 | - | 0.250 ± 0.000 |'
    assert lines[3] == '| ce | 0.600 | 0.300 | 0.250 |'
    assert {'commit a', 'commit b'} <= set(lines)


@pytest.mark.parametrize('figures', [{'coco/AR@100': 0.5, 'coco/AR@300': 0.6}, {'lvis/bbox_AP': 0.2}, {'PQ': 40.0}])
def test_all_figures_are_in_the_table_where_none_is_an_map(figures):
    header, _, row, *_ = compare.table([result('ce', 0, **figures)]).splitlines()
    assert header == f'| | {" | ".join(figures)} | seconds an iteration |'
    assert row == f'| ce | {" | ".join(f"{value:.3f}" for value in figures.values())} | 0.250 |'


@pytest.mark.slow
def test_trains_once_continues_and_refuses(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, 'SECONDS_BETWEEN_LINES', 0.2)
    make_dataset(tmp_path / 'data' / 'shapes', train=8, val=4)
    options = [*SMALL, 'train_cfg.max_epochs=3', 'train_cfg.val_interval=3', 'train_dataloader.batch_size=4']
    options += ['default_hooks.logger.interval=1', 'custom_imports.imports=[]']  # as mmdet's own configs
    arguments = ['--run', 'plain', PLAIN, 'model.backbone.depth=18', '--out-dir', 'out', '--cfg-options', *options]
    seed = tmp_path / 'out' / 'plain' / 'seed_0'

    # a group of its own, which Ctrl-C in a terminal reaches whole
    command = [sys.executable, ROOT / 'tools' / 'compare.py', *arguments]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    last = seed / 'last_checkpoint'
    assert wait_until(lambda: last.is_file() and last.read_text(), 120)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith('stopped; the same command continues\n')
    assert process.returncode == 1 and 'stopped in epoch ' in (seed / 'output.txt').read_text()
    assert not (seed / 'epoch_3.pth').exists()

    capfd.readouterr()
    assert call(compare.main, *arguments) is None
    assert re.search('resumed epoch: [12]', (seed / 'output.txt').read_text())
    printed = capfd.readouterr().out
    assert re.search(r'^1 of 1: plain, seed 0; its output goes to out/plain/seed_0/output.txt$', printed, re.M)
    assert re.search(r'^  train: \[[23]\]\[[12]/2\], \d:\d\d:\d\d left$', printed, re.M)
    assert re.search(r'^\| plain (\| -?\d\.\d{3} ){4}\| \d\.\d{3} \|$', printed, re.M)
    assert 'torch ' in printed and 'cores' in printed
    (row,) = csv.DictReader(Path('out/results.csv').read_text().splitlines())
    assert (row['run'], row['config'], row['seed'], row['iterations']) == ('plain', str(PLAIN), '0', '6')
    assert 'train_cfg.max_epochs=3' in row['options'] and float(row['seconds_per_iteration']) > 0
    assert {f'coco/{kind}_{ap}' for kind in ('bbox', 'segm') for ap in ('mAP', 'mAP_50', 'mAP_s')} <= {*row}
    assert '' not in row.values()

    before = (seed / 'output.txt').read_text()
    assert call(compare.main, *arguments) is None  # done: not run again
    message = call(compare.main, *arguments, 'optim_wrapper.optimizer.lr=1e-5')
    assert re.fullmatch(r'error: out/plain/seed_0\.py is another config; [^\n]+ --out-dir', message)
    assert (seed / 'output.txt').read_text() == before


@pytest.mark.slow
def test_a_training_that_fails_ends_the_comparison_with_its_message(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / 'data' / 'shapes', train=1, val=1, size=64)
    message = call(compare.main, PLAIN, '--cfg-options', *SMALL, 'optim_wrapper.optimizer.lrr=1')
    assert re.fullmatch(r'error: \S+python .*train\.py .* failed; its whole output: \S+/seed_0/output\.txt', message)
    assert "argument 'lrr'" in capfd.readouterr().err
