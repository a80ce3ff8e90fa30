"""The export tool: a checked file, or one clear line and no file."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys

import benchmark_ce
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.model import BaseModule
from utils import call, needs, randomize

from mmdet_ce.checkpoints.trained_backbone import load_backbone

NEEDS_EXPORT = needs('torch.export and export to ONNX')
if NEEDS_EXPORT.args[0]:  # before what follows is imported, which an older torch has no use for
    pytest.skip(NEEDS_EXPORT.kwargs['reason'], allow_module_level=True)

import export_onnx  # noqa: E402
import onnx  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('export_onnx')]  # one worker, one export

BACKBONE = dict(depth=18, base_channels=16, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Configs and checkpoints of a CE and of a plain detector."""
    folder = tmp_path_factory.mktemp('export')
    for name in ('CEResNet', 'ResNet'):
        cfg = dict(type=name, **BACKBONE)
        (folder / f'{name}.py').write_text(f'model = dict(type="MaskRCNN", backbone={cfg})')
        state_dict = randomize(MODELS.build(cfg)).state_dict()
        detector = {**{f'backbone.{key}': t for key, t in state_dict.items()}, 'neck.weight': torch.zeros(1)}
        torch.save(dict(state_dict=detector, meta=dict(epoch=1)), folder / f'{name}.pth')
        torch.save(state_dict, folder / f'{name}_backbone.pth')
    return folder


@pytest.fixture
def run(folder):
    """The command line: returns None, or the message that it ends with."""
    return lambda *names: call(export_onnx.main, *(folder / name for name in names))


@pytest.fixture(scope='module')
def exported(folder):
    """The file, what was printed, and the names in the file's folder, which did not exist before."""
    printed = io.StringIO()
    out = folder / 'new' / 'ce.onnx'
    with contextlib.redirect_stdout(printed):
        assert call(export_onnx.main, folder / 'CEResNet.py', folder / 'CEResNet.pth', out) is None
    return out.read_bytes(), printed.getvalue(), [path.name for path in out.parent.iterdir()]


@pytest.fixture
def no_export(monkeypatch, exported):
    """Spare the export: whatever the backbone, the model is that of CEResNet.pth."""
    monkeypatch.setattr(export_onnx, 'export', lambda backbone: exported[0])


def test_exports(exported):
    content, printed, names = exported
    assert len(re.findall(r'^\dx3x\d+x\d+: onnxruntime and torch differ by \de-\d\d', printed, re.M)) == 2
    assert names == ['ce.onnx']
    assert b'.py' not in content, 'names files of this machine'
    graph = onnx.load_from_string(content).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ['images', 'level0']
    sizes = [size.dim_param or size.dim_value for size in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ['batch', 3, 'height', 'width']
    assert sum(node.op_type == 'MatMul' for node in graph.node) == 3, 'one for each CE layer, no Newton iteration'


def test_weights_of_a_backbone_alone(folder, exported):
    cfg = Config.fromfile(folder / 'CEResNet.py')
    backbone = load_backbone(cfg, folder / 'CEResNet_backbone.pth')
    assert export_onnx.largest_difference(backbone, export_onnx.session(exported[0]), (1, 3, 32, 48)) < 1e-4


def test_other_numbers_are_not_written(run, folder, no_export):
    """Another file of this name stays."""
    (folder / 'kept.onnx').write_text('before')
    message = run('ResNet.py', 'ResNet.pth', 'kept.onnx')
    assert re.fullmatch(r'error: onnxruntime and torch differ by .* at 1x3x320x480; nothing was written', message)
    assert (folder / 'kept.onnx').read_text() == 'before' and not list(folder.glob('.*'))


@pytest.mark.parametrize('values', [(1, 1, np.nan), (np.nan, 1, 1)])
def test_nan_in_any_level_is_a_difference(values):
    class Session:
        def run(self, names, inputs):
            return [np.full((1, 2), value, np.float32) for value in values]

    difference = export_onnx.largest_difference(lambda x: [torch.ones(1, 2)] * 3, Session(), (1, 3, 8, 8))
    assert not difference <= export_onnx.TOLERANCE


def test_place_that_cannot_be_written(run, folder, no_export):
    (folder / 'taken').mkdir()
    message = run('CEResNet.py', 'CEResNet.pth', 'taken')
    assert re.fullmatch(r'error: .*taken could not be written \(Is a directory\)', message)
    assert not list(folder.glob('.*'))


def test_latency_of_all_four(folder, no_export, monkeypatch, tmp_path):
    cfg = Config.fromfile(folder / 'CEResNet.py')
    backbone = load_backbone(cfg, folder / 'CEResNet.pth')
    monkeypatch.setattr(benchmark_ce, 'plain_and_ce', lambda depth, x, norm_eval: (backbone, backbone))
    arguments = f'--what onnxruntime --batch 1 --size 64 64 --rounds 2 --device cpu --out-dir {tmp_path}'.split()
    assert call(benchmark_ce.main, *arguments) is None
    rows = json.loads((tmp_path / 'results.json').read_text())['rows']
    names = ['plain ResNet', 'CE', 'plain ResNet, onnxruntime', 'CE, onnxruntime']
    assert [row['candidate'] for row in rows] == names and all(row['median_ms'] > 0 for row in rows)
    assert call(benchmark_ce.main, *arguments, '--dtype', 'bfloat16') == 2


@pytest.mark.parametrize(
    'config, checkpoint, message',
    [
        ('none.py', 'ResNet.pth', 'error: config .*none.py not found'),
        ('ResNet.py', 'none.pth', 'error: checkpoint .*none.pth not found'),
        ('ResNet.py', 'ResNet.py', 'error: .*ResNet.py'),
        ('ResNet.py', 'list.pth', 'error: .*list.pth holds no state dict'),
        ('headless.py', 'ResNet.pth', 'error: the model of .*headless.py has no backbone'),
        ('CEResNet.py', 'ResNet.pth', 'error: .*ResNet.pth holds another backbone than .*CEResNet.py: .*ce1.theta'),
        ('ResNet.py', 'CEResNet.pth', 'error: .*CEResNet.pth holds another backbone than .*ResNet.py: .*ce1.theta'),
    ],
)
def test_bad_input(config, checkpoint, message, run, folder):
    torch.save([1], folder / 'list.pth')
    (folder / 'headless.py').write_text('model = dict(type="MaskRCNN")')
    error = run(config, checkpoint, 'bad.onnx')
    assert re.match(message, error) and '\n' not in error
    assert not (folder / 'bad.onnx').exists()


def test_backbone_that_cannot_be_exported(run, folder):
    @MODELS.register_module(force=True)
    class DataDependent(BaseModule):
        def forward(self, x):
            return (x if x.sum() > 0 else -x,)

    (folder / 'strange.py').write_text('model = dict(backbone=dict(type="DataDependent"))')
    torch.save({}, folder / 'strange.pth')
    error = run('strange.py', 'strange.pth', 'bad.onnx')
    assert error.startswith('error: torch cannot export this backbone (') and '\n' not in error


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(SystemExit, match='error: onnxruntime is not installed, .*pip install "mmdet_ce.deploy."'):
        runpy.run_path(export_onnx.__file__)
