"""The exported backbones: one product a CE layer, free batch and sizes, the numbers of torch."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from mmdet.registry import MODELS
from utils import assert_agree, needs, randomize

from mmdet_ce.ops.precision import is_exporting

pytestmark = [needs('torch.export and export to ONNX'), pytest.mark.xdist_group('export')]  # one worker, one export

ONE_STAGE = dict(base_channels=16, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
IDENTITY = dict(num_channels=8, identity_start=True)


class Family(torch.nn.Module):
    """A block of each backbone on the same images: one export takes seconds. CEResNet's is in test_export_onnx.py."""

    def __init__(self) -> None:
        super().__init__()
        self.backbones = torch.nn.ModuleList(
            [
                MODELS.build(dict(type='CEResNetV1d', depth=50, stem_channels=16, **ONE_STAGE)),
                MODELS.build(
                    dict(type='CEResNeXt', depth=50, groups=4, ce_position='after_norm2', ce_cfg=IDENTITY, **ONE_STAGE)
                ),
                MODELS.build(dict(type='CEMobileNetV2', widen_factor=0.5, out_indices=(0,))),
            ]
        )
        for backbone in self.backbones:
            backbone.layer1 = torch.nn.Sequential(backbone.layer1[0])
        mobilenet = self.backbones[2]
        for name in mobilenet.layers[1:]:
            delattr(mobilenet, name)
        mobilenet.layers = ['layer1']

    def forward(self, x):
        return tuple(level for backbone in self.backbones for level in backbone(x))


@pytest.fixture(scope='module')
def family():
    return randomize(Family()).eval()


@pytest.fixture(scope='module')
def num_ce(family):
    return sum(len(list(backbone.named_ce())) for backbone in family.backbones)


@pytest.fixture(scope='module')
def program(family):
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(family, (torch.zeros(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},))


@pytest.mark.slow
def test_torch_export(program, family, num_ce):
    """Saved and loaded; plain operations, with one batched product for each CE layer, and so no Newton iteration."""
    counts = Counter(str(node.target) for node in program.graph.nodes)
    assert num_ce == 5 and counts['aten.bmm.default'] == num_ce
    assert not any('baddbmm' in name or 'matmul' in name or 'wrap' in name or '.out' in name for name in counts)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.randn(3, 3, 96, 32)
    with torch.no_grad():
        for a, b in zip(loaded(x), family(x)):
            assert_agree(a, b, 1e-5)


@pytest.mark.slow
def test_onnx(program, family, num_ce):
    import export_onnx  # needs packages that an older torch has no use for

    model = torch.onnx.export(program, dynamo=True, verbose=False, input_names=['images']).model_proto
    session = export_onnx.session(model.SerializeToString())
    for shape in [(1, 3, 64, 96), (3, 3, 51, 37), (1, 3, 4, 4)]:  # the last: levels of a single position
        assert export_onnx.largest_difference(family, session, shape) < 1e-4
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts['MatMul'] == counts['Sigmoid'] == num_ce and counts['Gemm'] == 2 * num_ce
    rectified = {node.output[0] for node in model.graph.node if node.op_type == 'Relu'}
    readers = {node.op_type for node in model.graph.node if node.input[0] in rectified}
    assert 'Conv' in readers and 'Reshape' not in readers, 'no detour between the blocks'


def test_compiling_is_no_export():
    compiled = torch.compile(lambda x: x + is_exporting(), fullgraph=True, backend='eager')
    assert compiled(torch.zeros(1)) == 0 and not is_exporting()
