"""The tools as a user runs them: the demo; train, stop, resume, test; bad input; two processes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
from functools import partial
from pathlib import Path

import calibrate
import demo
import framework_tool
import pytest
import torch
from conftest import ROOT
from hostile import Calls
from make_shapes_dataset import make_dataset
from tool_runs import DEMO, MMDET_TOOLS, SMALL, output, run
from utils import call

from mmdet_ce.checkpoints import read_checkpoint

pytestmark = pytest.mark.slow
one_worker = pytest.mark.xdist_group('trained')  # what a demo trained serves all of these
run_train, run_test = (partial(framework_tool.run, f'{name}.py') for name in ('train', 'test'))


# mmengine 0.10.7 selects a GPU in its launchers, with gloo too; on a machine without one there is none to select.
# A thread of gloo's that is still there at exit aborts the process now and then.
SITE = """
import atexit, glob, torch
if not torch.cuda.is_available():
    torch.cuda.set_device = lambda device: None
names = lambda: [open(file).read().strip() for file in glob.glob('/proc/self/task/*/comm')]
atexit.register(lambda: print('threads at exit:', *names(), flush=True))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with a tiny shapes data set where the demo's config looks for it."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'data').mkdir()
    make_dataset(folder / 'data' / 'shapes', train=8, val=4)
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope='module')
def demonstrated(folder):
    """The work directory of a demo of one epoch, and what it printed."""
    config = folder / 'small.py'
    loaders = ''.join(
        f'{split}_dataloader = dict(num_workers=0, persistent_workers=False, batch_size=4)\n'
        for split in ('train', 'val', 'test')
    )
    config.write_text(f"_base_ = '{DEMO}'\n{loaders}train_cfg = dict(max_epochs=1)\n")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(demo, 'ROOT', folder)
        patch.setattr(demo, 'CONFIG', config)
        assert call(demo.main, '--work-dir', 'run') is None, (folder / 'run' / 'output.txt').read_text()[-3000:]
    return folder / 'run', printed.getvalue()


@pytest.fixture
def trained(demonstrated):
    """The work directory of one epoch of training with tools/train.py."""
    return demonstrated[0]


@one_worker
def test_demo_prints_its_result_and_keeps_the_rest_in_a_file(demonstrated):
    work_dir, printed = demonstrated
    lines = printed.splitlines()
    assert len(lines) < 30
    assert len([line for line in lines if line.startswith('$ python tools/')]) == 3
    for name in ('box', 'mask'):
        assert re.search(rf'^  {name} +mAP \d\.\d{{3}}   AP50 \d\.\d{{3}}$', printed, re.M)
    assert f'{Path("run/detections.png")}' in printed and f'{Path("run/output.txt")}' in printed
    assert (work_dir / 'detections.png').stat().st_size > 50_000
    log = (work_dir / 'output.txt').read_text()
    assert re.search(r'Epoch\(train\)\s+\[1\]\[2/2\]', log) or 'Saving checkpoint at 1 epochs' in log
    assert 'written: run/detections.png' in log and len(log.splitlines()) > 100


@one_worker
def test_resume_continues(trained, capfd):
    """After a kill, too: here one that left the newest checkpoint truncated, and none named."""
    (trained / 'epoch_2.pth').write_bytes((trained / 'epoch_1.pth').read_bytes()[:100_000])
    (trained / 'last_checkpoint').write_text('')
    options = [*SMALL, 'train_cfg.max_epochs=2', 'train_dataloader.batch_size=4']
    assert call(run_train, DEMO, '--work-dir', 'run', '--resume', '--cfg-options', *options) is None
    text = capfd.readouterr().out
    assert f'resuming from {trained / "epoch_1.pth"}, the newest whole checkpoint' in text
    assert 'epoch_2.pth is incomplete' in text and 'resumed epoch: 1, iter: 2' in text
    assert re.search(r'Epoch\(train\)\s+\[2\]\[2/2\]', text) or 'Saving checkpoint at 2 epochs' in text
    first, second = (read_checkpoint(trained / f'epoch_{n}.pth') for n in (1, 2))
    key = 'backbone.layer1.0.ce.bd.running_whitening'
    assert not torch.equal(first['state_dict'][key], second['state_dict'][key])


@one_worker
def test_mmdets_own_test_prints_map(trained, folder):
    text = output(run(MMDET_TOOLS / 'test.py', DEMO, trained / 'epoch_1.pth', options=SMALL, cwd=folder))
    assert re.search(r'coco/bbox_mAP: \d\.\d+', text) and re.search(r'coco/segm_mAP: \d\.\d+', text)


@one_worker
def test_calibrate_changes_statistics_only(trained, folder, capfd):
    arguments = [DEMO, trained / 'epoch_1.pth', 'calibrated.pth', '--num-batches', 2, '--cfg-options', *SMALL]
    assert call(calibrate.main, *arguments) is None
    assert 'calibrated.pth: CE statistics from 2 batches' in capfd.readouterr().out
    before, after = (read_checkpoint(path) for path in (trained / 'epoch_1.pth', folder / 'calibrated.pth'))
    assert before.keys() == after.keys() and before['state_dict'].keys() == after['state_dict'].keys()
    changed = {key for key, t in before['state_dict'].items() if not torch.equal(t, after['state_dict'][key])}
    expected = {'bd.running_mean', 'bd.running_whitening', 'ir.running_scale'}
    assert changed and all(any(key.endswith(name) for name in expected) for key in changed)
    torch.save(before['state_dict'], 'weights.pth')  # alone, as the converter and publishers write them
    arguments = [DEMO, 'weights.pth', 'weights_calibrated.pth', '--num-batches', 2, '--cfg-options', *SMALL]
    assert call(calibrate.main, *arguments) is None
    alone = read_checkpoint(folder / 'weights_calibrated.pth')
    assert alone.keys() == after['state_dict'].keys()
    assert all(torch.equal(t, alone[key]) for key, t in after['state_dict'].items())
    assert call(run_test, DEMO, 'calibrated.pth', '--cfg-options', *SMALL) is None
    assert 'coco/bbox_mAP: ' in capfd.readouterr().out


@one_worker
@pytest.mark.parametrize('content', ['missing', 'hostile', 'truncated', 'another network'])
def test_calibrate_refuses(content, trained, tmp_path):
    path, marker = tmp_path / 'a.pth', tmp_path / 'marker'
    if content == 'hostile':
        torch.save({'state_dict': {}, 'payload': Calls(os.system, f'touch {marker}')}, path)
    elif content == 'truncated':
        path.write_bytes((trained / 'epoch_1.pth').read_bytes()[:100_000])
    elif content == 'another network':
        torch.save({'state_dict': {'patch_embed.weight': torch.zeros(1)}}, path)
    message = call(calibrate.main, DEMO, path, tmp_path / 'out.pth', '--cfg-options', *SMALL)
    assert re.fullmatch('error: [^\n]+', message)
    assert not (tmp_path / 'out.pth').exists() and not marker.exists()


@one_worker
def test_truncated_checkpoint_is_refused(trained, tmp_path):
    path = tmp_path / 'truncated.pth'
    path.write_bytes((trained / 'epoch_1.pth').read_bytes()[:100_000])
    message = call(run_test, DEMO, path, '--cfg-options', *SMALL)
    assert message.startswith(f'error: checkpoint {path} is incomplete')


def damage(checkpoint: dict, part: str) -> None:
    """Exchange a part of a training's state by one of the right type that does not fit."""
    groups = checkpoint['optimizer']['param_groups']
    if part == 'optimizer of another network':
        groups[0]['params'] = groups[0]['params'][:3]
    elif part == 'learning rate':
        groups[0]['lr'] = 'fast'
    elif part == 'step':
        checkpoint['param_schedulers'][0]['last_step'] = 'last'


@one_worker
@pytest.mark.parametrize('part', ['optimizer of another network', 'learning rate', 'step'])
def test_a_state_that_does_not_fit_is_one_line(part, trained, tmp_path):
    checkpoint = read_checkpoint(trained / 'epoch_1.pth')
    damage(checkpoint, part)
    torch.save(checkpoint, tmp_path / 'epoch_1.pth')
    arguments = ['--work-dir', tmp_path, '--resume', tmp_path / 'epoch_1.pth']
    message = call(run_train, DEMO, *arguments, '--cfg-options', *SMALL, 'train_cfg.max_epochs=2')
    assert re.fullmatch('error: [^\n]+', message) and ('resume' in message or 'refused' in message), message


@one_worker
def test_a_full_disk_is_one_line_and_loses_nothing(trained, folder, tmp_path):
    """A limit on the size of files stands in for a full disk, from the second checkpoint on."""
    first = (trained / 'epoch_1.pth').read_bytes()
    (tmp_path / 'epoch_1.pth').write_bytes(first)
    (tmp_path / 'sitecustomize.py').write_text(
        'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))'
    )
    arguments = ['--work-dir', tmp_path, '--resume', tmp_path / 'epoch_1.pth']
    options = [*SMALL, 'train_cfg.max_epochs=2', 'train_dataloader.batch_size=4']
    result = run(ROOT / 'tools' / 'train.py', DEMO, *arguments, options=options, cwd=folder, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1 and 'Traceback' not in result.stderr, result.stderr[-3000:]
    assert 'File too large; make room there' in result.stderr.splitlines()[-1]
    assert (tmp_path / 'epoch_1.pth').read_bytes() == first
    assert not (tmp_path / 'epoch_2.pth').exists() and not [*tmp_path.glob('.*.tmp')]


def test_mmdets_own_tools_refuse_a_hostile_checkpoint(folder):
    marker, path = folder / 'marker', folder / 'hostile.pth'
    torch.save({'state_dict': {}, 'payload': Calls(os.system, f'touch {marker}')}, path)
    result = run(MMDET_TOOLS / 'test.py', DEMO, path, options=SMALL, cwd=folder)
    assert result.returncode and 'nothing in it was run' in result.stderr and not marker.exists()


def test_bad_input_is_one_line_on_the_terminal(folder):
    result = run(ROOT / 'tools' / 'train.py', 'none.py', cwd=folder)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith('error: config none.py not found')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--cfg-options', 'train_dataloader.dataset.data_root=none'], 'error: data root none does not exist'),
        (['--resume', 'none.pth'], 'error: checkpoint none.pth not found'),
    ],
)
def test_missing_inputs_are_one_line(arguments, message):
    error = call(run_train, DEMO, *arguments)
    assert error.startswith(message) and '\n' not in error


def test_nothing_whole_to_resume_from_is_one_line(folder):
    work_dir = folder / 'killed'
    work_dir.mkdir()
    (work_dir / 'epoch_1.pth').write_bytes(b'PK')
    message = call(run_train, DEMO, '--work-dir', work_dir, '--resume')
    assert re.fullmatch('error: no whole checkpoint to resume from in [^\n]+ without --resume', message)
    message = call(run_train, DEMO, '--work-dir', work_dir, '--cfg-options', 'resume=True')
    assert message.startswith('error: no whole checkpoint to resume from in ')


def test_two_processes(folder, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(SITE)
    with socket.create_server(('127.0.0.1', 0)) as server:  # free, where another suite runs on this machine
        port = str(server.getsockname()[1])
    env = dict(PYTHONPATH=str(tmp_path), OMP_NUM_THREADS='1', PORT=port)
    # gloo, and no device_ids, mmengine's default, which DistributedDataParallel refuses on a CPU
    options = [*SMALL, 'env_cfg.dist_cfg.backend=gloo', 'model_wrapper_cfg.type=MMDistributedDataParallel']
    options += ['model_wrapper_cfg.device_ids=None', 'model_wrapper_cfg.broadcast_buffers=False']
    options += ['train_cfg.max_epochs=1', 'train_cfg.val_interval=9', 'train_dataloader.batch_size=2']
    script = ROOT / 'tools' / 'dist_train.sh'
    text = output(run(script, DEMO, 2, '--work-dir', 'two', options=options, cwd=folder, **env))
    at_exit = re.findall(r'threads at exit: (.*)', text)
    assert len(at_exit) >= 3 and not any('gloo' in names for names in at_exit), 'launcher and two processes'
    script = ROOT / 'tools' / 'dist_test.sh'
    text = output(run(script, DEMO, 'two/epoch_1.pth', 2, options=options, cwd=folder, **env))
    assert re.search(r'coco/bbox_mAP: ', text) and re.search(r'coco/segm_mAP: ', text)


@pytest.mark.parametrize('detector', ['mask-rcnn', 'retinanet'])
def test_real_coco_images(detector, coco_tiny, tmp_path, monkeypatch, capfd):
    """The shipped configs, changed on the command line only: train, resume and test on real images."""
    config = ROOT / 'configs' / 'ce' / f'{detector}_r50-ce_fpn_1x_coco.py'
    resize = {'train': 2, 'val': 1, 'test': 1}
    # After two steps no score is over the default threshold, and mmdet prints no AP for an empty result.
    threshold = {'mask-rcnn': 'model.test_cfg.rcnn.score_thr=0', 'retinanet': 'model.test_cfg.score_thr=0'}[detector]
    options = [*SMALL, 'model.backbone.init_cfg=None', 'train_dataloader.dataset.indices=4', threshold]
    options += ['train_cfg.val_interval=10']  # the test evaluates
    if detector == 'mask-rcnn':  # thousands of proposals take a CPU long and test nothing more
        options += ['model.test_cfg.rcnn.max_per_img=10', 'model.test_cfg.rpn.max_per_img=50']
        options += ['model.train_cfg.rpn_proposal.max_per_img=50']
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
    assert 'resumed epoch: 1, iter: 2' in capfd.readouterr().out
    assert call(run_test, config, 'run/epoch_2.pth', '--cfg-options', *options) is None
    assert 'coco/bbox_mAP: ' in capfd.readouterr().out
