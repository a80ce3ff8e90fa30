"""Every place of every tool that takes a checkpoint refuses hostile ones in one line, and nothing in them runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import calibrate
import framework_tool
import official_to_mmdet_ce
import publish_model
import pytest
from conftest import ROOT
from make_shapes_dataset import make_dataset
from mmengine.config import Config
from utils import call

from mmdet_ce.preflight import find_problems

DEMO = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18-ce_fpn_8e_shapes.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with the data set of the demo's config."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'data').mkdir()
    make_dataset(folder / 'data' / 'shapes', train=1, val=1, size=64)
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Run a tool of the framework on the demo's config; return what it ends with."""
    monkeypatch.chdir(folder)
    return lambda tool, *arguments: call(partial(framework_tool.run, tool), DEMO, *arguments)


def check_refusal(message: str, path: Path, name: str) -> None:
    """A line names the file, and says that it was refused or cannot be a checkpoint."""
    assert str(path) in message and '\n' not in message, (name, message)
    assert any(word in message for word in ('refused', 'damaged', 'incomplete', 'no checkpoint', 'not a ')), message


def test_converter_publisher_and_calibration(hostile_files, tmp_path, monkeypatch):
    paths, marker = hostile_files
    out, cfg = tmp_path / 'out.pth', Config.fromfile(DEMO)
    for name, path in paths.items():
        for tool, arguments in (
            (official_to_mmdet_ce.convert, (path, out)),
            (publish_model.publish, (path, out)),
            (calibrate.calibrate_checkpoint, (cfg, path, out, 1, False, 'cpu')),
        ):
            with pytest.raises(official_to_mmdet_ce.CheckpointFileError) as info:
                pytest.fail(f'{name}: {tool(*arguments)}')
            check_refusal(str(info.value), path, name)
        assert not marker.exists() and not [*tmp_path.iterdir()], name


def test_every_place_of_train_and_test(hostile_files, folder, monkeypatch):
    """``--resume FILE``, ``load_from`` and initial weights of a training, and the checkpoint of a test."""
    monkeypatch.chdir(folder)
    paths, marker = hostile_files
    cfg = Config.fromfile(DEMO)
    for name, path in paths.items():
        cfg.load_from = str(path.with_name(f'copy_of_{path.name}'))
        Path(cfg.load_from).write_bytes(path.read_bytes())
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
        resume, load_from, pretrained = find_problems(cfg, 'train', str(path))
        (test,) = find_problems(cfg, 'test', str(path))
        assert pretrained.startswith('pretrained weights: '), name
        for message, file in ((resume, path), (load_from, Path(cfg.load_from)), (pretrained, path), (test, path)):
            check_refusal(message, file, name)
        assert not marker.exists(), name


@pytest.mark.slow
def test_train_and_test(hostile_files, run):
    paths, marker = hostile_files
    path = paths['os.system']
    for message in (run('train.py', '--resume', path), run('test.py', path)):
        assert message.startswith('error: ')
        check_refusal(message, path, 'os.system')
    assert not marker.exists()


@pytest.mark.slow
def test_automatic_resume(hostile_files, run, folder, tmp_path):
    """``--resume`` takes the file that ``last_checkpoint`` names."""
    paths, marker = hostile_files
    (tmp_path / 'epoch_1.pth').write_bytes(paths['os.system'].read_bytes())
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    message = run('train.py', '--work-dir', tmp_path, '--resume')
    assert message.startswith('error: ') and '\n' not in message and not marker.exists()
