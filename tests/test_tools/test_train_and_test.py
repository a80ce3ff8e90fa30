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
from tool_runs import DEMO, MMDET_TOOLS, SMALL, output, run, start
from utils import call, is_running, wait_until

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


def test_a_training_anew_in_its_folder_is_refused(folder):
    arguments = [DEMO, '--work-dir', 'run', '--cfg-options', *SMALL, 'train_cfg.max_epochs=1']
    assert call(run_train, *arguments) is None
    before = Path('run/epoch_1.pth').read_bytes()
    message = call(run_train, *arguments)
    assert re.fullmatch(r'error: run holds a training: [^\n]+ --work-dir, or continue it with --resume', message)
    assert Path('run/epoch_1.pth').read_bytes() == before


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads the state of processes from /proc')
def test_ctrl_c_says_the_epoch_and_what_continues(folder, capfd):
    options = [*SMALL, 'train_cfg.max_epochs=99', 'train_cfg.val_interval=99']
    arguments = [ROOT / 'tools' / 'train.py', DEMO, '--work-dir', 'stopped']
    process, log = start(*arguments, options=options, cwd=folder)
    assert wait_until(lambda: saved('stopped'), 120), log.read_text()[-3000:]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    last = log.read_text().splitlines()[-1]
    stopped = re.match(r'stopped in epoch (\d+)\. To continue: python \S+train\.py', last)
    assert 'Traceback' not in log.read_text()
    _, *command, resume = shlex.split(last.partition('To continue: python ')[2])
    assert call(run_train, *command, f'train_cfg.max_epochs={stopped[1]}', resume) is None
    resumed = re.search(r'resumed epoch: (\d+)', capfd.readouterr().out)
    assert int(stopped[1]) - int(resumed[1]) in (0, 1), 'between two epochs the last one is saved already'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--cfg-options', 'train_dataloader.dataset.data_root=none'], 'error: annotation file none/annotations/'),
        (['--resume', 'none.pth'], 'error: checkpoint none.pth not found'),
    ],
)
def test_missing_inputs_are_one_line(arguments, message):
    error = call(run_train, DEMO, *arguments)
    assert error.startswith(message) and '\n' not in error


# mmengine 0.10.7 selects a GPU in its launchers, with gloo too; on a machine without one there is none to select.
# A thread of gloo's that is still there at exit aborts the process now and then.
SITE = """
import atexit, glob, os, torch
if not torch.cuda.is_available():
    torch.cuda.set_device = lambda device: None
names = lambda: [open(file).read().strip() for file in glob.glob('/proc/self/task/*/comm')]
atexit.register(lambda: os.write(1, ' '.join(['threads at exit:', *names(), '\\n']).encode()))  # one write, one line
"""


def running(marker: str) -> list[int]:
    """Return the processes that have a marker in their environment."""
    found = []
    for path in Path('/proc').glob('[0-9]*/environ'):
        try:
            found += [int(path.parent.name)] if marker.encode() in path.read_bytes() else []
        except OSError:
            continue
    return [pid for pid in found if is_running(pid)]


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads the state of processes from /proc')
def test_two_processes_train_end_with_their_script_and_test(folder, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(SITE)
    with socket.create_server(('127.0.0.1', 0)) as server:  # free, where another suite runs on this machine
        port = str(server.getsockname()[1])
    marker = f'MMDET_CE_TEST={tmp_path}'
    env = dict([marker.split('=')], PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}', OMP_NUM_THREADS='1', PORT=port)
    # gloo, and no device_ids, mmengine's default, which DistributedDataParallel refuses on a CPU
    options = [*SMALL, 'env_cfg.dist_cfg.backend=gloo', 'model_wrapper_cfg.type=MMDistributedDataParallel']
    options += ['model_wrapper_cfg.device_ids=None', 'model_wrapper_cfg.broadcast_buffers=False']
    training = [*options, 'train_cfg.max_epochs=99', 'train_cfg.val_interval=100', 'train_dataloader.batch_size=2']
    arguments = [ROOT / 'tools' / 'dist_train.sh', DEMO, 2, '--work-dir', 'two']
    process, log = start(*arguments, options=training, cwd=folder, **env)
    assert wait_until(lambda: saved('two'), 180), log.read_text()[-3000:]
    assert len(running(marker)) >= 3, 'launcher and two processes'
    process.kill()  # the launcher, which cannot end what it started
    assert wait_until(lambda: not running(marker), 60)
    assert process.wait() not in (0, None)
    script = ROOT / 'tools' / 'dist_test.sh'
    text = output(run(script, DEMO, saved('two'), 2, options=options, cwd=folder, **env))
    assert re.search(r'coco/bbox_mAP: ', text) and re.search(r'coco/segm_mAP: ', text)
    at_exit = re.findall(r'threads at exit: (.*)', text)
    assert len(at_exit) >= 3 and not any('gloo' in names for names in at_exit)


@pytest.mark.parametrize('detector', ['mask-rcnn', 'retinanet'])
def test_real_coco_images(detector, coco_tiny, tmp_path, monkeypatch, capfd):
    """The shipped configs, changed on the command line only: train, resume and test on real images."""
    config = ROOT / 'configs' / 'ce' / f'{detector}_r50-ce_fpn_1x_coco.py'
    resize = {'train': 2, 'val': 1, 'test': 1}
    # After two steps no score is over the default threshold, and mmdet prints no AP for an empty result.
    threshold = {'mask-rcnn': 'model.test_cfg.rcnn.score_thr=0', 'retinanet': 'model.test_cfg.score_thr=0'}[detector]
    options = [*SMALL, 'model.backbone.init_cfg=None', 'train_dataloader.dataset.indices=2', threshold]
    options += ['train_cfg.val_interval=10', 'test_dataloader.dataset.indices=4']  # the test evaluates
    if detector == 'mask-rcnn':  # thousands of proposals take a CPU long and test nothing more
        options += ['model.test_cfg.rcnn.max_per_img=10', 'model.test_cfg.rpn.max_per_img=50']
        options += ['model.train_cfg.rpn_proposal.max_per_img=50', 'model.train_cfg.rcnn.sampler.num=32']
    for split, place in resize.items():
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
    if detector == 'mask-rcnn':  # mmdet's own tool
        text = output(run(MMDET_TOOLS / 'test.py', config, 'run/epoch_2.pth', options=options, cwd=tmp_path))
    else:
        assert call(run_test, config, 'run/epoch_2.pth', '--cfg-options', *options) is None
        text = capfd.readouterr().out
    assert 'coco/bbox_mAP: ' in text
