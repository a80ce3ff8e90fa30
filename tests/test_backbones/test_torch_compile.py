"""CEResNet as one graph of torch.compile, where torch can."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from utils import assert_agree, needs, randomize

from mmdet_ce import CEResNet, ChannelEquilibrium
from mmdet_ce.backbones.ce_resnet import CEBottleneck
from mmdet_ce.compat import FEATURES, TORCH
from mmdet_ce.layers import block_end
from mmdet_ce.ops import precision

COMPILE = dict(fullgraph=TORCH >= FEATURES['torch.compile without a graph break'], backend='aot_eager')


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_compiles_in_evaluation(memory_format):
    backbone = randomize(CEResNet(depth=18, base_channels=16)).eval().to(memory_format=memory_format)
    x = torch.randn(1, 3, 32, 32).to(memory_format=memory_format)
    with torch.no_grad():
        outs = torch.compile(backbone, **COMPILE)(x)
        for a, b in zip(outs, backbone(x)):
            assert_agree(a, b, 1e-5)


@pytest.mark.parametrize('norm_eval, memory_format', [(True, torch.contiguous_format), (False, torch.channels_last)])
def test_compiles_in_training(norm_eval, memory_format):
    backbone = CEResNet(depth=18, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,), norm_eval=norm_eval)
    backbone = randomize(backbone).train().to(memory_format=memory_format)
    other = copy.deepcopy(backbone)
    x = torch.randn(2, 3, 32, 32).to(memory_format=memory_format)
    (expected,), (out,) = backbone(x), torch.compile(other, **COMPILE)(x)
    expected.square().mean().backward(), out.square().mean().backward()
    assert_agree(out, expected, 1e-5)
    for (name, a), b in zip(other.named_parameters(), backbone.parameters()):
        assert_agree(a.grad, b.grad, 1e-4, name)
    for (name, a), b in zip(other.named_buffers(), backbone.buffers()):
        assert_agree(a, b, 1e-5, name)


@needs('torch.compile without a graph break')
def test_inductors_gradients_through_a_convolution(monkeypatch):
    """Inductor of torch 2.13 drops alpha in torch.add(x, a @ b, alpha=2), in silence."""
    monkeypatch.setattr(block_end, 'LEAST_POSITIONS_PER_CHANNEL', 0)
    block = CEBottleneck(32, 8, ce=dict(num_channels=8))
    x = torch.randn(2, 32, 8, 8)
    gradients = []
    for function in (block, torch.compile(block)):
        block.zero_grad()
        (function(x) ** 2).sum().backward()
        gradients.append(block.conv3.weight.grad)
    assert_agree(gradients[1], gradients[0], 1e-3)


@needs('torch.compile without a graph break')
def test_compiles_for_a_shortcut_of_unknown_size():
    """Whether the shortcut has the shape of the result is then known in symbols alone."""
    norm, ce, relu = randomize(nn.ModuleList([nn.BatchNorm2d(32), ChannelEquilibrium(32), nn.ReLU()])).eval()

    def function(x, shortcut):
        return block_end.block_end(x, norm, ce, shortcut=shortcut, relu=relu)

    x, shortcut = torch.randn(2, 2, 32, 8, 9)
    out = torch.compile(function, dynamic=True, **COMPILE)(x, shortcut)
    assert_agree(out, function(x, shortcut), 1e-5)


@needs('torch.compile without a graph break')
@pytest.mark.parametrize('training, on_cuda', [(True, False), (True, True), (False, False)])
def test_compiles_under_autocast(training, on_cuda, monkeypatch):
    """The backward pass is computed in float32, as without torch.compile; for sizes that change."""
    monkeypatch.setattr(precision, 'stays_16_bit', lambda x: on_cuda)
    ce = randomize(ChannelEquilibrium(32)).train(training)
    x = torch.randn(2, 32, 8, 8).bfloat16()
    weights = torch.randn_like(x)
    gradients = []
    for function in (ce, torch.compile(ce, dynamic=True, **COMPILE)):
        ce.zero_grad()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = function(x)
        (out * weights).sum().backward()
        gradients.append(ce.ir.fc1.weight.grad)
    assert_agree(gradients[1], gradients[0], 1e-4)
