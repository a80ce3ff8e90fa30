"""Fixtures of the kernels' tests: on a GPU, or in Triton's interpreter, which is taken for one (make test-kernels)."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

from mmdet_ce.ops import dispatch, triton_check

GPU = torch.cuda.is_available()
INTERPRETED = bool(importlib.util.find_spec('triton')) and os.environ.get('TRITON_INTERPRET') == '1'


def take_for_a_gpu(patch: pytest.MonkeyPatch, choice: str) -> None:
    """Forget what was decided; without a GPU, let the CPU be one of compute capability 8.0."""
    patch.setenv(dispatch.VARIABLE, choice)
    for memory in (dispatch._verdicts, dispatch._reported):
        memory.clear()
    dispatch.device_obstacle.cache_clear()
    if not GPU:
        patch.setattr(dispatch, 'DEVICE_TYPE', 'cpu')
        patch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
        patch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
        patch.setattr(torch.cuda, 'get_device_name', lambda device: 'an interpreter')


@pytest.fixture
def triton_form(monkeypatch):
    """Every layer takes the Triton form, without a check of its own."""
    if not (INTERPRETED or (GPU and importlib.util.find_spec('triton'))):
        pytest.skip('needs Triton and a GPU, or its interpreter: make test-kernels')
    take_for_a_gpu(monkeypatch, 'triton')
    monkeypatch.setattr(triton_check, 'verdict', lambda *layer: None)
    yield
    assert {reason for _, reason in dispatch._reported} == {None}


@pytest.fixture
def tf32(monkeypatch):
    """The interpreter multiplies as the tensor cores do: of operands it drops what TF32 has no bits for."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def rounded(operand):
        bits = np.ascontiguousarray(operand.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return TensorHandle(bits.view(np.float32), operand.dtype)

    def dot(self, a, b, total, precision, *rest):
        if precision.name == 'TF32':
            a, b = rounded(a), rounded(b)
        return create_dot(self, a, b, total, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, 'create_dot', dot)
