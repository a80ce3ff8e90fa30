"""The gate's modules are called where they are more than their weights: hooked, parametrized, wrapped, replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from utils import assert_agree, randomize

from mmdet_ce import ChannelEquilibrium


class Lora(nn.Module):
    """A linear layer with an addition of low rank, which is 0 at first."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def lora(ce):
    ce.ir.fc1 = Lora(ce.ir.fc1)


def with_bias(ce):
    fc2 = ce.ir.fc2
    ce.ir.fc2 = nn.Linear(fc2.in_features, fc2.out_features)
    ce.ir.fc2.weight = fc2.weight
    nn.init.zeros_(ce.ir.fc2.bias)


KINDS = {
    'forward hook': lambda ce: ce.ir.fc1.register_forward_hook(lambda *_: None),
    'hook of the norm': lambda ce: ce.ir.norm.register_forward_pre_hook(lambda *_: None),
    'backward hook': lambda ce: ce.ir.fc2.register_full_backward_hook(lambda *_: None),
    'weight_norm': lambda ce: nn.utils.weight_norm(ce.ir.fc1),
    'parametrization': lambda ce: parametrize.register_parametrization(ce.ir.fc2, 'weight', nn.Identity()),
    'pruning': lambda ce: prune.identity(ce.ir.fc2, 'weight'),
    'wrapper': lora,
    'bias': with_bias,
}


@pytest.mark.parametrize('change', KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('folded', [True, False])
def test_what_leaves_the_numbers_leaves_them(change, training, folded):
    """Output, statistics, and the gradients of the input and of all that the gate does not have, in two steps."""
    norm = randomize(nn.BatchNorm2d(32)).double().eval() if folded else None
    plain = randomize(ChannelEquilibrium(32)).double().train(training)
    other = copy.deepcopy(plain)
    change(other)
    other.double()
    for _ in range(2):
        results = []
        for ce in (plain, other):
            x = torch.randn(2, 32, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 2
            shortcut = x.square().requires_grad_()
            out = ce(x.requires_grad_(), norm, shortcut, relu=True)
            out.square().sum().backward()
            results.append((out, x.grad, shortcut.grad, ce.theta.grad, *ce.buffers()))
        for a, b in zip(*reversed(results)):
            assert_agree(a, b, 1e-9)
    assert all(p.grad is not None for p in other.parameters())


def test_a_gate_with_quantized_linear_layers():
    ce, x = randomize(ChannelEquilibrium(32)).eval(), torch.randn(2, 32, 5, 6)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(ce), {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.ir.fc1) is not nn.Linear
    assert_agree(quantized(x), ce(x), 0.02)


def test_what_changes_the_numbers_changes_them():
    ce = randomize(ChannelEquilibrium(32)).eval()
    x = torch.randn(2, 32, 5, 6)
    before = ce(x)
    pruned, hooked = copy.deepcopy(ce), copy.deepcopy(ce)
    prune.l1_unstructured(pruned.ir.fc1, 'weight', amount=0.9)
    pruned.ir.fc1.weight_orig.data.neg_()
    hooked.ir.fc2.register_forward_hook(lambda module, inputs, out: out + 3)
    for other in (pruned, hooked):
        assert (other(x) - before).abs().max() > 1e-2
