"""The tools as a user runs them: train, stop, resume, test; bad input; two processes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
from functools import partial
from pathlib import Path

import framework_tool
import pytest
from conftest import ROOT
from make_shapes_dataset import make_dataset
from mmengine.config import Config
from tool_runs import DEMO, SMALL, output, run, start
from utils import call, wait_until

pytestmark = pytest.mark.slow
run_train, run_test = (partial(framework_tool.run, f'{name}.py') for name in ('train', 'test'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with a tiny shapes data set where the demo's config looks for it."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'data').mkdir()
    make_dataset(folder / 'data' / 'shapes', train=8, val=6)
    return folder


def saved(work_dir: str) -> str:
    """Return the checkpoint that a training has named as its last; '' if there is none yet."""
    last = Path(work_dir, 'last_checkpoint')
    return last.read_text() if last.is_file() else ''


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


BY_EPOCH = ['train_cfg.max_epochs=99', 'train_cfg.val_interval=99']
BY_ITERATION = """
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=999, val_interval=999)
train_dataloader = dict(sampler=dict(type='InfiniteSampler', shuffle=True))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2))
param_scheduler = []
"""


@pytest.mark.parametrize('unit', ['epoch', 'iteration'])
def test_ctrl_c_says_where_and_what_continues(unit, folder, capfd):
    config = folder / f'{unit}.py'
    config.write_text(f"_base_ = '{DEMO}'\n{BY_ITERATION if unit == 'iteration' else ''}")
    options = [*SMALL, *(BY_EPOCH if unit == 'epoch' else [])]
    process, log = start(ROOT / 'tools' / 'train.py', config, '--work-dir', unit, options=options, cwd=folder)
    assert wait_until(lambda: saved(unit), 120), log.read_text()[-3000:]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert 'Traceback' not in log.read_text()
    last = log.read_text().splitlines()[-1]
    stopped = re.match(rf'stopped in {unit} (\d+)\. To continue: python \S+train\.py', last)
    assert int(stopped[1]) > 1
    _, *command, resume = shlex.split(last.partition('To continue: python ')[2])
    message = call(run_train, *command)
    assert re.fullmatch(rf'error: {unit} holds a training: [^\n]+ --work-dir, or continue it with --resume', message)
    if unit == 'epoch':
        assert call(run_train, *command, f'train_cfg.max_epochs={stopped[1]}', resume) is None
        resumed = re.search(r'resumed epoch: (\d+)', capfd.readouterr().out)
        assert int(stopped[1]) - int(resumed[1]) in (0, 1), 'between two epochs the last one is saved already'


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--cfg-options', 'train_dataloader.dataset.data_root=none'], 'error: annotation file none/annotations/'),
        (['--resume', 'none.pth'], 'error: checkpoint none.pth not found'),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    error = call(run_train, DEMO, *arguments)
    assert error.startswith(message) and '\n' not in error


@pytest.mark.parametrize('name', ['config.yaml', 'lr=0.1/config.json', 'lr=0.1.py'])
def test_a_config_is_looked_at_whatever_its_path(name, tmp_path):
    cfg = Config.fromfile(DEMO)
    cfg.model.backbone.ce_evall = True
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    cfg.dump(path)
    assert "no argument 'ce_evall'" in call(run_train, '--work-dir', DEMO.stem, path)


# mmengine 0.10.7 selects a GPU in its launchers, with gloo too; on a machine without one there is none to select.
# A thread of gloo's that is still there at exit aborts the process now and then.
SITE = """
import atexit, glob, os, torch
if not torch.cuda.is_available():
    torch.cuda.set_device = lambda device: None
names = lambda: [open(file).read().strip() for file in glob.glob('/proc/self/task/*/comm')]
atexit.register(lambda: os.write(1, ' '.join(['threads at exit:', *names(), '\\n']).encode()))  # one write, one line
"""


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads the threads of processes from /proc')
def test_two_processes_train_and_test(folder, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(SITE)
    with socket.create_server(('127.0.0.1', 0)) as server:  # free, where another suite runs on this machine
        port = str(server.getsockname()[1])
    env = dict(PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}', OMP_NUM_THREADS='1', PORT=port)
    # gloo, and no device_ids, mmengine's default, which DistributedDataParallel refuses on a CPU
    options = [*SMALL, 'env_cfg.dist_cfg.backend=gloo', 'model_wrapper_cfg.type=MMDistributedDataParallel']
    options += ['model_wrapper_cfg.device_ids=None', 'model_wrapper_cfg.broadcast_buffers=False']
    train = partial(run, ROOT / 'tools' / 'dist_train.sh', DEMO, 2, '--work-dir', 'two', cwd=folder, **env)
    wrong = train(options=[*options, 'model.backbone.ce_evall=True'])
    assert wrong.returncode and wrong.stderr.count("no argument 'ce_evall'") == 1, 'by one of the processes'

    output(train(options=[*options, 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=2']))
    script = ROOT / 'tools' / 'dist_test.sh'
    text = output(run(script, DEMO, saved('two'), 2, options=options, cwd=folder, **env))
    assert re.search(r'coco/bbox_mAP: ', text) and re.search(r'coco/segm_mAP: ', text)
    at_exit = re.findall(r'threads at exit: (.*)', text)
    assert len(at_exit) >= 3 and not any('gloo' in names for names in at_exit)


def test_real_coco_images(coco_tiny, tmp_path, monkeypatch, capfd):
    """A shipped config, by its name and changed on the command line only: train, resume and test on real images."""
    config = 'ce/mask-rcnn_r50-ce_fpn_1x_coco'
    options = [*SMALL, 'train_dataloader.dataset.indices=2', 'test_dataloader.dataset.indices=4']
    options += ['model.backbone.init_cfg=None', 'model.backbone.norm_eval=False', 'model.backbone.frozen_stages=-1']
    # After two steps no score is over the default threshold, and mmdet prints no AP for an empty result.
    options += ['train_cfg.val_interval=10', 'model.test_cfg.rcnn.score_thr=0']
    # Thousands of proposals take a CPU long and test nothing more.
    options += ['model.test_cfg.rcnn.max_per_img=10', 'model.test_cfg.rpn.max_per_img=50']
    options += ['model.train_cfg.rpn_proposal.max_per_img=50', 'model.train_cfg.rcnn.sampler.num=32']
    for split, place in dict(train=2, val=1, test=1).items():
        options += [
            f'{split}_dataloader.dataset.data_root={coco_tiny}/',
            f'{split}_dataloader.dataset.pipeline.{place}.scale=(160,128)',
        ]
        if split != 'train':
            options.append(f'{split}_evaluator.ann_file={coco_tiny}/annotations/instances_val2017.json')
    monkeypatch.chdir(tmp_path)
    arguments = [config, '--work-dir', 'run', '--cfg-options', *options]
    assert call(run_train, *arguments, 'train_cfg.max_epochs=1') is None
    assert call(run_train, *arguments, 'train_cfg.max_epochs=2', '--resume') is None
    assert 'resumed epoch: 1, iter: 1' in capfd.readouterr().out
    assert call(run_test, config, 'run/epoch_2.pth', '--cfg-options', *options) is None
    assert 'coco/bbox_mAP: ' in capfd.readouterr().out
