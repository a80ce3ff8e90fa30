"""The gate's modules are called, and not their weights alone taken, where they have hooks."""

from __future__ import annotations

import copy

import torch
from utils import randomize

from mmdet_ce import ChannelEquilibrium


def test_a_hook_of_the_gate_is_called_and_counts():
    ce = randomize(ChannelEquilibrium(32)).eval()
    hooked = copy.deepcopy(ce)
    hooked.ir.fc2.register_forward_hook(lambda module, inputs, out: out + 3)
    x = torch.randn(2, 32, 5, 6)
    assert (hooked(x) - ce(x)).abs().max() > 1e-2
