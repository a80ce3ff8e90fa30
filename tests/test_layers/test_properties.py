"""ChannelEquilibrium over generated shapes, dtypes, memory formats and arguments: right results, or clear errors."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from utils import assert_agree, randomize, reference

from mmdet_ce import CEMobileNetV2, CEResNet, ChannelEquilibrium

# The same examples in every run, so that a failure is a change of the code
generated = settings(derandomize=True, deadline=None, max_examples=100, database=None)

# Largest difference, of the largest magnitude. Half precision errs by its own rounding, twice; in float32 the gate's
# LayerNorm magnifies rounding, as it divides by sqrt(1e-5) where all it is given are alike.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the values of ``x`` in another memory layout; those of its first image for 'expanded'."""
    return {
        'contiguous': lambda: x,
        'channels_last': lambda: x.contiguous(memory_format=torch.channels_last),
        'sliced': lambda: torch.stack([x, -x], dim=4).flatten(3)[..., ::2],
        'transposed': lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        'expanded': lambda: x[:1].expand_as(x),
    }[layout]()


shapes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
blocks = st.fixed_dictionaries(
    dict(
        num_channels=st.sampled_from([2, 3, 4, 8, 16]),
        num_iterations=st.integers(1, 6),
        reduction=st.integers(1, 4),
        eps=st.sampled_from([1e-5, 1e-3]),
        identity_start=st.booleans(),
    )
)


@generated
@given(
    block=blocks,
    num_groups=st.integers(1, 3),
    shape=shapes,
    dtype=st.sampled_from([*TOLERANCE]),
    layout=st.sampled_from(['contiguous', 'channels_last', 'sliced', 'transposed', 'expanded']),
    training=st.booleans(),
    with_norm=st.booleans(),
    seed=st.integers(0, 9),
)
@example(  # one value a channel: Sigma is eps I, and its gradient times x - m is 0 times 1 / eps
    block=dict(num_channels=2, num_iterations=3, reduction=1, eps=1e-5, identity_start=False),
    num_groups=1,
    shape=(1, 1, 1),
    dtype=torch.float32,
    layout='contiguous',
    training=True,
    with_norm=False,
    seed=0,
)
def test_equals_the_reference(block, num_groups, shape, dtype, layout, training, with_norm, seed):
    """Output and all gradients, for any shape (1x1, one image), dtype and layout, the norm before CE folded or not."""
    torch.manual_seed(seed)
    channels, (n, h, w) = num_groups * block['num_channels'], shape
    block = {**block, 'reduction': min(block['reduction'], channels)}
    ce = randomize(ChannelEquilibrium(channels, **block), seed).to(dtype).train(training)
    norm = randomize(nn.BatchNorm2d(channels), seed).to(dtype).eval() if with_norm else None
    x = lay_out(torch.randn(n, channels, h, w).to(dtype), layout).requires_grad_()
    grad = torch.randn(n, channels, h, w).to(dtype)
    ce64, norm64 = copy.deepcopy(ce).double(), copy.deepcopy(norm).double() if with_norm else nn.Identity()
    x64 = x.detach().double().requires_grad_()

    expected = reference(ce64, norm64(x64)).out
    inputs64 = [x64, *ce64.parameters(), *norm64.parameters()]
    expected_grads = torch.autograd.grad(expected, inputs64, grad.double())
    out = ce(x, norm)
    inputs = [x, *ce.parameters(), *(norm.parameters() if with_norm else ())]
    grad_x, *grads = torch.autograd.grad(out, inputs, grad)

    assert out.dtype == dtype
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert_agree(out, expected, TOLERANCE[dtype], 'out')
    assert_agree(grad_x, expected_grads[0], TOLERANCE[dtype], 'grad_x')
    # together, since one alone may be zero up to rounding
    flat, expected_flat = (torch.cat([g.flatten() for g in gs]) for gs in (grads, expected_grads[1:]))
    assert_agree(flat, expected_flat, TOLERANCE[dtype], 'gradients of the parameters')


ARGUMENTS = dict(
    in_channels=st.sampled_from([4, 12, 16, 17, 48]),
    num_channels=st.sampled_from([2, 4, 16, 64]),
    num_iterations=st.integers(1, 40),
    reduction=st.integers(1, 4),
    eps=st.floats(1e-8, 1),
    momentum=st.floats(0.01, 1),
)
BAD = {int: [0, -1, 2.5, '16', None, True], float: [0, -1.0, 1e300, float('inf'), float('nan')]}
bad_arguments = st.sampled_from(
    [(name, value) for name in ARGUMENTS for value in BAD[float if name in ('eps', 'momentum') else int]]
)


@generated
@given(st.fixed_dictionaries(ARGUMENTS), bad_arguments)
def test_arguments_work_or_are_refused(arguments, bad):
    with pytest.raises(ValueError, match=bad[0]):
        ChannelEquilibrium(**{**arguments, bad[0]: bad[1]})
    in_channels = arguments['in_channels']
    if in_channels % 2:
        with pytest.raises(ValueError, match='in_channels=17 cannot be grouped'):
            ChannelEquilibrium(**arguments)
        return
    ce, x = ChannelEquilibrium(**arguments), torch.randn(2, in_channels, 3, 3, requires_grad=True)
    ce(x).square().sum().backward()
    for tensor in (x.grad, *(p.grad for p in ce.parameters()), *ce.buffers()):
        assert torch.isfinite(tensor).all()


@generated
@given(st.lists(st.sampled_from([0, 1, 4, 5]), max_size=5), st.sampled_from([torch.int32, torch.complex64]))
def test_inputs_are_refused(shape, dtype):
    ce = ChannelEquilibrium(4, num_channels=2)
    with pytest.raises(ValueError, match='ChannelEquilibrium expects'):
        ce(torch.ones(2, 4, 3, 3, dtype=dtype))
    if len(shape) == 4 and shape[1] == 4 and 0 not in shape:
        assert ce(torch.ones(shape)).shape == tuple(shape)
    else:
        with pytest.raises(ValueError, match='ChannelEquilibrium expects'):
            ce(torch.ones(shape))


@settings(generated, max_examples=15)
@given(
    st.sampled_from([(CEResNet, dict(depth=18, base_channels=8), 4), (CEMobileNetV2, dict(widen_factor=0.25), 7)]),
    st.data(),
)
def test_backbones_work_or_refuse(network, data):
    cls, size, num_stages = network
    right = st.lists(st.booleans(), min_size=num_stages, max_size=num_stages)
    stages, ce_cfg = data.draw(right), dict(num_channels=data.draw(st.sampled_from([2, 8, 64])))
    wrong = data.draw(st.sampled_from([stages[1:], [*stages, True], [*stages[1:], 'yes'], 'True', True, 7]))
    for bad in (dict(stage_with_ce=wrong), dict(ce_cfg=data.draw(st.sampled_from([16, 'CE', True, [8]])))):
        with pytest.raises(ValueError, match=next(iter(bad))):
            cls(**{'stage_with_ce': stages, 'ce_cfg': ce_cfg, **size, **bad})
    levels = cls(stage_with_ce=stages, ce_cfg=ce_cfg, **size).eval()(torch.randn(1, 3, 32, 32))
    assert all(torch.isfinite(level).all() for level in levels)
