"""The command for COCO: rows, checks, plan, and a killed run that continues."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import benchmark_coco
import pytest
from coco import publish as publishing
from coco.rows import CONFIGS, all_rows, plain_config, plain_name
from conftest import ROOT
from launch import Launch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from trainings import Training
from utils import call

ROW, PLAIN = 'retinanet_r18-ce-identity_fpn_1x_coco', 'retinanet_r18_fpn_1x_coco'
main = partial(call, benchmark_coco.main)


def small_options() -> list[str]:
    """What makes a training of RetinaNet short, and lets a network that learned nothing find something."""
    options = ['model.backbone.init_cfg=None', 'model.test_cfg.score_thr=0', 'train_dataloader.batch_size=1']
    options.append('train_dataloader.dataset.indices=2')
    for split, place in {'train': 2, 'val': 1, 'test': 1}.items():
        options += [f'{split}_dataloader.num_workers=0', f'{split}_dataloader.persistent_workers=False']
        options.append(f'{split}_dataloader.dataset.pipeline.{place}.scale=(96,96)')
    return options


# Rows and their plain counterparts


def test_each_row_has_the_plain_counterpart_that_its_table_names():
    tables = (CONFIGS / 'README.md').read_text()
    for row in all_rows():
        (baseline,) = re.findall(rf'^\| \[`{row}`\].*? \| (\S+/\S+)', tables, flags=re.M)
        assert baseline.split('/')[1] == plain_name(row) or 'mobilenet' in row


KINDS = ('r50-ce_fpn_1x', 'r50-syncbn-ce_fpn_1x', 'r50-ce_fpn_amp-1x', 'mobilenet-v2-ce-identity_fpn_1x')


@pytest.mark.slow
@pytest.mark.parametrize('row', [f'retinanet_{kind}_coco' for kind in KINDS])
def test_all_but_the_backbone_of_a_plain_counterpart_is_the_rows(row):
    plain, own = plain_config(row), Config.fromfile(CONFIGS / f'{row}.py')
    assert "type='CE" not in plain.pretty_text and own.model.backbone.type == f'CE{plain.model.backbone.type}'
    assert {**plain.model, 'backbone': None} == {**own.model, 'backbone': None}
    assert all(plain[key] == own[key] for key in own if key != 'model')
    if 'mobilenet' in row:
        assert plain.model.backbone == dict(type='MobileNetV2', init_cfg=own.model.backbone.init_cfg)
    else:
        mmdets = Config.fromstring(f"_base_ = 'mmdet::retinanet/{plain_name(row)}.py'", '.py')
        assert plain.model == mmdets.model and plain.optim_wrapper == mmdets.optim_wrapper
    shared = plain_config('retinanet_r50-ce-identity_fpn_1x_coco') if row == 'retinanet_r50-ce_fpn_1x_coco' else plain
    assert shared.pretty_text == plain.pretty_text, 'one name, one config'


@pytest.mark.parametrize('detector', ['retinanet', 'mask-rcnn'])
def test_a_schedule_is_that_of_mmdet(detector, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['tool', '--schedule', '2x'])
    options = benchmark_coco.config_options(benchmark_coco.parse_args(), seed=3)
    one, two = (CONFIGS / f'{detector}_r50-ce_fpn_{schedule}_coco.py' for schedule in ('1x', '2x'))
    cfg, expected = Training(str(one), Path('out'), options).read_config(), Config.fromfile(two)
    assert cfg.param_scheduler == expected.param_scheduler and cfg.train_cfg == expected.train_cfg
    assert cfg.randomness.seed == 3 and cfg.auto_scale_lr.enable and cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_dataloader.dataset.data_root == 'data/coco/'


# What is refused before anything starts


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--rows', 'resnet'], '--rows resnet: no such config'),
        (['--gpus', '-1'], '--gpus must be 0 or more'),
        (['--launcher', 'slurm'], '--launcher slurm needs --partition'),
        (['--into', 'copy'], '--into goes with --publish'),
    ],
)
def test_the_command_line_is_checked(arguments, message, capsys):
    assert main(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Three training images and one for validation, in COCO's layout; the working directory is beside them."""
    monkeypatch.chdir(tmp_path)
    classes = [dict(id=index, name=name) for index, name in enumerate(CocoDataset.METAINFO['classes'])]
    for split, number in (('train2017', 3), ('val2017', 1)):
        images = [dict(id=i, file_name=f'{i}.jpg', width=64, height=64) for i in range(number)]
        boxes = [dict(id=i, image_id=i, category_id=0, bbox=[1, 1, 40, 40], area=1600, iscrowd=0) for i in range(1)]
        (tmp_path / 'coco' / split).mkdir(parents=True)
        for image in images:
            (tmp_path / 'coco' / split / image['file_name']).write_bytes(b'1')
        file = tmp_path / 'coco' / 'annotations' / f'instances_{split}.json'
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(dict(images=images, annotations=boxes, categories=classes)))
    return tmp_path / 'coco'


def problems(*arguments: object) -> list[str]:
    message = main('--data-root', 'coco', '--gpus', 0, '--rows', ROW, '--dry-run', *arguments)
    assert not Path('work_dirs/coco', ROW).exists(), 'something started'
    lines = message.splitlines()
    assert all(line.startswith('error: ') for line in lines)
    return lines


def test_a_subset_is_not_taken_for_coco(data):
    found = problems('--cfg-options', 'model.backbone.init_cfg=None')
    assert len(found) == 4
    for split, number in (('train2017', "3 images, expected COCO's 118,287"), ('val2017', "1 images, expected COCO's")):
        assert [number in line and split in line and '--subset' in line for line in found].count(True) == 2


def test_all_problems_are_named_at_once(data):
    (data / 'train2017' / '1.jpg').unlink()
    (data / 'train2017' / '2.jpg').write_bytes(b'')
    (data / 'annotations' / 'instances_val2017.json').write_text('{"images": [')
    options = ['model.backbone.init_cfg.checkpoint=none.pth']
    found = problems('--subset', '--cfg-options', *options)
    assert len(found) == len(set(found)) == 5
    for part in (
        'val_dataloader.dataset.ann_file) cannot be read',
        'test_dataloader.dataset.ann_file) cannot be read',
        'pretrained weights none.pth not found',
        '1 of the 3 images that coco/annotations/instances_train2017.json lists are missing in coco/train2017',
        '1 of the 3 images that coco/annotations/instances_train2017.json lists are empty in coco/train2017',
    ):
        assert [part in line for line in found].count(True) == 1, (part, found)


def test_a_missing_data_root_and_weights_that_no_network_brings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = ['model.backbone.init_cfg.checkpoint=http://127.0.0.1:9/weights.pth']
    first, second = problems('--cfg-options', *weights)
    assert first.startswith('error: data root coco not found; expected the folder of COCO 2017')
    assert second.startswith('error: weights http://127.0.0.1:9/weights.pth could not be fetched')


def test_gpus_that_are_not_there(data):
    found = problems('--subset', '--gpus', 99, '--cfg-options', 'model.backbone.init_cfg=None')
    assert len(found) == 1 and '--gpus 99: this machine has' in found[0]


def test_a_folder_of_another_training_is_named(data):
    folder = Path('work_dirs/coco') / PLAIN / 'seed_0'
    folder.mkdir(parents=True)
    (folder / 'epoch_3.pth').write_bytes(b'1')
    (found,) = problems('--subset', '--cfg-options', 'model.backbone.init_cfg=None')
    assert f'{folder} holds a training of another config' in found


# How trainings and tests are started


def test_the_commands_of_slurm_are_what_its_scripts_take(tmp_path, monkeypatch):
    srun = tmp_path / 'srun'
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    launch, folder = Launch('slurm', 16, 'gpu'), Path('out/row/seed_0')

    def asked(command: list[str]) -> list[str]:
        return subprocess.run(command, env=launch.environment(), capture_output=True, text=True).stdout.splitlines()

    lines = asked([*launch.train('c.py', folder, ['a=1', 'b=2']), '--resume'])
    assert {'--partition=gpu', '--job-name=row', '--ntasks=16'} <= set(lines)
    tail = ['--launcher', 'slurm', '--cfg-options', 'a=1', 'b=2', '--resume']
    assert lines[lines.index('python') + 3 :] == ['c.py', '--work-dir', str(folder), *tail]
    lines = asked(launch.test('c.py', folder / 'epoch_1.pth', folder / 'test', ['a=1']))
    tail = ['--launcher', 'slurm', '--work-dir', str(folder / 'test'), '--cfg-options', 'a=1']
    assert lines[lines.index('python') + 3 :] == ['c.py', str(folder / 'epoch_1.pth'), *tail]


def test_the_commands_of_several_gpus_are_what_their_scripts_take(tmp_path):
    """Another python on the path shows what torch's launcher would be started with."""
    python = tmp_path / 'python'
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    launch, folder = Launch('pytorch', 8), Path('out/row/seed_0')
    assert launch.environment()['PATH'].startswith(str(Path(sys.executable).parent))

    def asked(command: list[str]) -> list[str]:
        env = {**launch.environment(), 'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'}
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout.splitlines()

    lines = asked(launch.train('c.py', folder, ['a=1']))
    assert '--nproc_per_node=8' in lines
    tail = ['--launcher', 'pytorch', '--work-dir', str(folder), '--cfg-options', 'a=1']
    assert lines[lines.index('c.py') :] == ['c.py', *tail]
    lines = asked(launch.test('c.py', folder / 'epoch_1.pth', folder / 'test', ['a=1']))
    assert '--nproc_per_node=8' in lines
    tail = ['--launcher', 'pytorch', '--work-dir', str(folder / 'test'), '--cfg-options', 'a=1']
    assert lines[lines.index('c.py') :] == ['c.py', str(folder / 'epoch_1.pth'), *tail]


# Real trainings on a few images of COCO


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, '-W', 'ignore', ROOT / 'tools' / 'benchmark_coco.py', *arguments]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, start_new_session=True)


def end_like_a_crash(process: subprocess.Popen) -> None:
    """SIGKILL to the tool and to the training that it runs, which is in a group of its own."""
    children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True)
    process.kill()
    process.wait()
    for child in children.stdout.split():
        os.killpg(int(child), signal.SIGKILL)


@pytest.mark.slow
def test_killed_continued_and_published(coco_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ['--data-root', coco_tiny, '--subset', '--gpus', 0, '--rows', ROW, '--out-dir', 'out']
    arguments += ['--cfg-options', *small_options(), 'train_cfg.max_epochs=2']
    seeds = {name: tmp_path / 'out' / name / 'seed_0' for name in (PLAIN, ROW)}
    process = start(*arguments)
    try:
        while not (seeds[PLAIN] / 'epoch_1.pth').is_file():
            assert process.poll() is None, 'it ended before its first checkpoint'
            time.sleep(0.02)
    finally:
        end_like_a_crash(process)
    assert not (seeds[PLAIN] / 'epoch_2.pth').exists() and not seeds[ROW].exists()

    assert main(*arguments, '--dry-run') is None
    assert 'continues at epoch 2' in capsys.readouterr().out
    assert main(*arguments) is None
    assert 'resumed epoch: 1, iter: 2' in (seeds[PLAIN] / 'output.txt').read_text()
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())['results']
    assert list(results) == [PLAIN, ROW]
    for name, starts in ((PLAIN, 2), (ROW, 1)):
        one = results[name]['0']
        assert len(one['starts']) == starts and one['metrics'].keys() == {'coco/bbox_mAP'} and one['epochs'] == 2
        assert one['trial'][0] == 'a subset of COCO' and one['hardware']
        assert re.fullmatch('[0-9a-f]{40}|unknown', one['starts'][0]['commit']) and one['starts'][0]['versions']
        assert (seeds[name] / 'output.txt').read_text().count('randomness = dict(seed=0)') >= 1, 'the same seed'

    capsys.readouterr()
    logs = {name: (folder / 'output.txt').read_text() for name, folder in seeds.items()}
    assert main(*arguments) is None  # all is done
    assert {name: (folder / 'output.txt').read_text() for name, folder in seeds.items()} == logs
    assert len(re.findall(r'\bdone\b', capsys.readouterr().out)) == 2
    assert 'are a trial' in main('--publish', '--out-dir', 'out')
    assert main('--publish', '--out-dir', 'out', '--into', 'copy') is None
    assert 'a trial, not COCO' in (tmp_path / 'copy' / publishing.TABLES).read_text()


@pytest.mark.slow
def test_the_plan_through_slurm(coco_tiny, tmp_path, monkeypatch, capsys):
    """A stand-in for srun starts one process, without Slurm's variables."""
    srun = tmp_path / 'srun'
    srun.write_text(
        '#!/usr/bin/env bash\nwhile [ "$1" != python ]; do shift; done\n'
        'arguments=("$@")\nexec "${arguments[@]/#slurm/none}"\n'
    )
    srun.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.chdir(tmp_path)
    arguments = ['--data-root', coco_tiny, '--subset', '--launcher', 'slurm', '--partition', 'gpu', '--gpus', 4]
    arguments += ['--rows', ROW, '--schedule', '2x', '--seeds', 0, 1, '--dry-run', '--out-dir', 'out']
    assert main(*arguments, '--cfg-options', *small_options()) is None
    printed = capsys.readouterr().out
    rows = re.findall(r'(retinanet_\S+) +│ +(\d) │ +(\d+) │ +(\d+) │ +\d+\.\d+ │.*to do', printed)
    assert [row[:3] for row in rows] == [(PLAIN, '0', '24'), (ROW, '0', '24'), (PLAIN, '1', '24'), (ROW, '1', '24')]
    assert (
        'left to train on 4 GPUs' in printed
        and 'GPU hours' in printed
        and not (tmp_path / 'out' / 'results.json').exists()
    )
