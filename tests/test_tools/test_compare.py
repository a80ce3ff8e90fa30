"""tools/compare.py trains once, continues what was begun, refuses another config, and draws up the results."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import compare
import pytest
from child_process import TOOLS
from conftest import ROOT
from make_shapes_dataset import make_dataset
from tool_runs import SMALL, start
from utils import call, wait_until

PLAIN = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18_fpn_8e_shapes.py'


def command(monkeypatch, tmp_path, tool: str, *arguments: str) -> list[str]:
    """The command line of a training or a test; the config is at /c/seed_0.py."""
    monkeypatch.setattr(sys, 'argv', ['compare.py', '--run', 'c', str(PLAIN), *arguments])
    training = compare.Training('c', 0, None, Path('/c/seed_0'))
    return compare.command(compare.parse_args(), tool, training, 'w')


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ([], [sys.executable, '-W', 'ignore', f'{TOOLS}/train.py', '/c/seed_0.py', 'w']),
        (['--gpus', '8'], [f'{TOOLS}/dist_train.sh', '/c/seed_0.py', 'w', '8']),
        (
            ['--gpus', '8', '--launcher', 'slurm', '--partition', 'p'],
            [f'{TOOLS}/slurm_train.sh', 'p', 'c', '/c/seed_0.py', 'w'],
        ),
    ],
)
def test_launchers(arguments, expected, monkeypatch, tmp_path):
    assert command(monkeypatch, tmp_path, 'train', *arguments) == expected
    assert command(monkeypatch, tmp_path, 'test', *arguments) == [part.replace('train.', 'test.') for part in expected]


def test_configs_are_found_by_path_and_by_name(tmp_path):
    by_name = compare.load('mask-rcnn_r18_fpn_8e_shapes', ['model.backbone.depth=34'])
    assert by_name.model.backbone.depth == 34
    assert compare.load(str(PLAIN), ['model.backbone.depth=34']).pretty_text == by_name.pretty_text
    plain = compare.load('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', ['randomness.seed=1'])
    assert plain.model.backbone.type == 'ResNet' and plain.randomness.seed == 1
    assert call(lambda: compare.load('none', [])).startswith('error: config none not found')


def test_the_command_line_and_all_inputs_are_checked_before_the_first_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(compare.main) == 2 and call(compare.main, PLAIN, PLAIN) == 2
    assert call(compare.main, PLAIN, '--cfg-options', 'foo') == 2 and 'KEY=VALUE, got foo' in capsys.readouterr().err
    message = call(compare.main, PLAIN, '--run', 'b', PLAIN, 'train_dataloader.dataset.ann_file=b.json')
    assert 'b.json not found' in message and all(line.startswith('error: ') for line in message.splitlines())
    assert not any(tmp_path.iterdir())


def result(bbox: float, environment: str = 'commit a') -> dict:
    return dict(metrics={'coco/bbox_mAP': bbox}, seconds_per_iteration=0.25, environment=environment)


def test_table_has_mean_and_spread():
    results = {'plain': {0: result(0.4), 1: result(0.5, 'commit b')}, 'ce': {0: result(0.6)}}
    results['ce'][0]['metrics']['coco/segm_mAP'] = 0.3
    lines = compare.table(results).splitlines()
    assert lines[0] == '| | bbox_mAP | segm_mAP | seconds an iteration |'
    assert lines[2] == '| plain | 0.450 ± 0.071 | - | 0.250 ± 0.000 |'
    assert lines[3] == '| ce | 0.600 | 0.300 | 0.250 |'
    assert {'commit a', 'commit b'} <= set(lines)


@pytest.mark.slow
def test_trains_once_continues_and_refuses(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / 'data' / 'shapes', train=8, val=4)
    options = [*SMALL, 'train_cfg.max_epochs=3', 'train_cfg.val_interval=3', 'train_dataloader.batch_size=4']
    options += ['default_hooks.logger.interval=1', 'custom_imports.imports=[]']  # as mmdet's own configs
    arguments = ['--run', 'plain', PLAIN, 'model.backbone.depth=18', '--out-dir', 'out', '--cfg-options', *options]
    seed = tmp_path / 'out' / 'plain' / 'seed_0'

    process, _ = start(TOOLS / 'compare.py', *arguments, cwd=tmp_path)
    last = seed / 'last_checkpoint'
    assert wait_until(lambda: last.is_file() and last.read_text(), 120)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1 and 'stopped in epoch ' in (seed / 'output.txt').read_text()
    assert not (seed / 'epoch_3.pth').exists()

    assert call(compare.main, *arguments) is None
    assert re.search('resumed epoch: [12]', (seed / 'output.txt').read_text())
    printed = capfd.readouterr().out
    assert re.search(r'^\| plain (\| -?\d\.\d{3} ){4}\| \d\.\d{3} \|$', printed, re.M)
    assert 'commit ' in printed and 'torch ' in printed and 'cores' in printed
    one = json.loads(Path('out/results.json').read_text())['plain']['0']
    assert set(one['metrics']) == {f'coco/{kind}_{ap}' for kind in ('bbox', 'segm') for ap in ('mAP', 'mAP_50')}
    assert one['seconds_per_iteration'] > 0
    assert Path('out/table.md').read_text() in printed and Path('out/curves.png').stat().st_size > 10_000

    before = (seed / 'output.txt').read_text()
    assert call(compare.main, *arguments) is None  # done: not run again
    message = call(compare.main, *arguments, 'optim_wrapper.optimizer.lr=1e-5')
    assert re.fullmatch(r'error: out/plain/seed_0\.py is another config; [^\n]+ --out-dir', message)
    assert (seed / 'output.txt').read_text() == before
