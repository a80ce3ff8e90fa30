"""Launches of the Triton form, and the bytes of maps that its kernels read and write, counted in the interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from budgets import Budget
from torch.utils._python_dispatch import _disable_current_modes
from utils import randomize

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import dispatch as kernels

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        not importlib.util.find_spec('triton') or os.environ.get('TRITON_INTERPRET') != '1',
        reason="needs Triton's interpreter: make test-kernels",
    ),
]
MAX_LAUNCHES = 15  # of a layer in training, forward and backward


@pytest.fixture
def counters(monkeypatch):
    """Count launches of kernels, and elements of 16 bits that they load and store: those of maps, and no others."""
    from triton.runtime.interpreter import InterpreterBuilder

    from mmdet_ce.ops import triton_coefficients, triton_launch, triton_maps

    counts = dict(launches=0, elements=0)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(pointers, mask):
        counts['elements'] += int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth == 16)

    def counted_load(self, pointers, mask, *rest):
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_start(*args, **kwargs):
        counts['launches'] += 1
        with _disable_current_modes():  # what the interpreter itself does with tensors is no launch
            triton_launch.start(*args, **kwargs)

    monkeypatch.setattr(InterpreterBuilder, 'create_masked_load', counted_load)
    monkeypatch.setattr(InterpreterBuilder, 'create_masked_store', counted_store)
    for module in (triton_maps, triton_coefficients):
        monkeypatch.setattr(module, 'start', counted_start)
    monkeypatch.setenv(kernels.VARIABLE, 'triton')
    kernels._triton_on.cache_clear()
    yield counts
    kernels._triton_on.cache_clear()


@pytest.mark.parametrize(
    ('training', 'folded', 'tail', 'channels_last'),
    [
        (True, True, True, False),
        (True, False, False, True),
        (False, True, True, True),
        (False, True, False, False),
    ],
)
def test_a_layer_stays_in_its_budget(counters, training, folded, tail, channels_last):
    """Forward x is read twice and y written; backward x and dy are read twice and dx written.

    With the tail, the shortcut is read; backward y is read once and the gradient of the shortcut written, both of which
    a ReLU of its own would do as well.
    """
    ce = randomize(ChannelEquilibrium(32)).train(training)
    norm = randomize(torch.nn.BatchNorm2d(32)).eval() if folded else None
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, shortcut, grad = (torch.randn(2, 32, 48, 48).bfloat16().to(memory_format=memory_format) for _ in range(3))
    x.requires_grad_()
    shortcut = shortcut.requires_grad_() if tail else None
    with Budget(x.numel()) as torch_budget:
        out = ce(x, norm, shortcut, relu=tail)
        forward = counters['elements'] / x.numel()
        out.backward(grad)
    backward = counters['elements'] / x.numel() - forward
    launches, maps = torch_budget.take()
    assert counters['launches'] + launches <= MAX_LAUNCHES, (counters['launches'], launches)
    assert maps == 0  # torch moves none
    # more by what the reduction reads twice of each stretch: its first block, for a mean to start from
    assert forward <= (4 if tail else 3) + 0.12 and backward <= (7 if tail else 5), (forward, backward)
