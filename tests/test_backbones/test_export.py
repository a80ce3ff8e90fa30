"""The exported backbones: one product a CE layer, free batch and sizes, the numbers of torch."""

from __future__ import annotations

import io

import pytest
import torch
from mmdet.registry import MODELS
from utils import assert_agree, needs, randomize, unset_statistics

from mmdet_ce.compat import TORCH

pytestmark = pytest.mark.xdist_group('export')  # one worker, one export
needs_export = needs('torch.export and export to ONNX')
DYNAMO = {} if TORCH < (2, 5) else dict(dynamo=False)

ONE_STAGE = dict(base_channels=16, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
IDENTITY = dict(num_channels=8, identity_start=True)


class Family(torch.nn.Module):
    """A block of each backbone on the same images: one export takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.backbones = torch.nn.ModuleList(
            [
                MODELS.build(dict(type='CEResNet', depth=18, **ONE_STAGE)),
                MODELS.build(dict(type='CEResNetV1d', depth=50, stem_channels=16, **ONE_STAGE)),
                MODELS.build(
                    dict(type='CEResNeXt', depth=50, groups=4, ce_position='after_norm2', ce_cfg=IDENTITY, **ONE_STAGE)
                ),
                MODELS.build(dict(type='CEMobileNetV2', widen_factor=0.5, out_indices=(0,))),
            ]
        )
        for backbone in self.backbones:
            backbone.layer1 = torch.nn.Sequential(backbone.layer1[0])
        mobilenet = self.backbones[-1]
        for name in mobilenet.layers[1:]:
            delattr(mobilenet, name)
        mobilenet.layers = ['layer1']

    def forward(self, x):
        return tuple(level for backbone in self.backbones for level in backbone(x))


@pytest.fixture(scope='module')
def family():
    return randomize(Family()).eval()


@pytest.fixture(scope='module')
def program(family):
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(family, (torch.zeros(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},))


@pytest.mark.slow
@needs_export
def test_torch_export(program, family):
    """Saved and loaded, and run at another size."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.randn(3, 3, 96, 32)
    with torch.no_grad():
        for a, b in zip(loaded(x), family(x)):
            assert_agree(a, b, 1e-5)


SIZES = [(1, 3, 64, 96), (3, 3, 51, 37), (1, 3, 4, 4)]  # the last: levels of a single position


def largest_difference(model: bytes, family: torch.nn.Module, x: torch.Tensor) -> float:
    """Return how far onnxruntime is from torch, of the largest magnitude."""
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    with torch.no_grad():
        pairs = zip(session.run(None, {'images': x.numpy()}), family(x))
    return max(((torch.from_numpy(a) - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.slow
@needs_export
def test_onnx(program, family):
    pytest.importorskip('onnxscript')
    model = torch.onnx.export(program, dynamo=True, verbose=False, input_names=['images']).model_proto
    for shape in SIZES:
        assert largest_difference(model.SerializeToString(), family, torch.randn(shape)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('opset', [11, 17])
def test_the_exporter_of_torch_script(opset, family):
    """As mmdeploy exports. It has neither unflatten (opset 11) nor diag_embed."""
    file, axes = io.BytesIO(), {'images': {0: 'batch', 2: 'height', 3: 'width'}}
    images = torch.zeros(2, 3, 64, 96)
    torch.onnx.export(family, (images,), file, opset_version=opset, **DYNAMO, input_names=['images'], dynamic_axes=axes)
    for shape in SIZES:
        assert largest_difference(file.getvalue(), family, torch.randn(shape)) < 1e-4


def exported(model: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
    return torch.export.export(model, (x,)).module()


@pytest.mark.parametrize('record', [torch.jit.trace, pytest.param(exported, marks=needs_export)])
def test_a_backbone_is_recorded_before_its_first_forward_pass(record):
    """The look at CE's statistics is no part of what is recorded, and is left for the first pass that is not."""
    backbone = MODELS.build(dict(type='CEResNet', depth=18, **ONE_STAGE)).eval()
    x = torch.randn(1, 3, 32, 32)
    recorded = []
    warned = unset_statistics(lambda: (recorded.append(record(backbone, x)), backbone(x)))
    assert len(warned) == 1
    assert_agree(recorded[0](x)[0], backbone(x)[0], 1e-5)
