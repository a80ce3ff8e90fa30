"""Launches of the Triton form, and the bytes of maps that its kernels read and write, counted in the interpreter."""

from __future__ import annotations

import pytest
import torch
from budgets import Budget
from torch.utils._python_dispatch import _disable_current_modes
from utils import randomize

from mmdet_ce import ChannelEquilibrium

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures('interpreter', 'triton_form')]
MAX_LAUNCHES = 15  # of a layer in training, forward and backward


@pytest.fixture
def counters(monkeypatch):
    """Count launches of kernels, and elements of 16 bits that they load and store: those of maps, and no others."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    counts = dict(launches=0, elements=0)
    run = InterpretedFunction.run

    def launch(*args, **kwargs):
        counts['launches'] += 1
        with _disable_current_modes():  # what the interpreter itself does with tensors is no launch
            run(*args, **kwargs)

    def counted(method, mask_index):
        def move(self, pointers, *args):
            width = pointers.get_element_ty().primitive_bitwidth
            counts['elements'] += int(args[mask_index].data.sum()) * (width == 16)
            return method(self, pointers, *args)

        return move

    monkeypatch.setattr(InterpretedFunction, 'run', launch)
    for name, mask_index in (('create_masked_load', 0), ('create_masked_store', 1)):
        monkeypatch.setattr(InterpreterBuilder, name, counted(getattr(InterpreterBuilder, name), mask_index))
    return counts


@pytest.mark.parametrize(
    ('training', 'folded', 'tail', 'channels_last'),
    [(True, True, True, False), (True, False, False, True), (False, True, True, True), (False, True, False, False)],
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
    # more by the first positions of each stretch, which are read twice: about their mean x is taken
    assert forward <= (4 if tail else 3) + 0.15 and backward <= (7 if tail else 5) + 0.05, (forward, backward)
