"""ChannelEquilibrium over generated shapes, dtypes, memory formats and arguments."""

from __future__ import annotations

import copy

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from utils import assert_agree, randomize, reference

from mmdet_ce import ChannelEquilibrium

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
    norm_trains=st.sampled_from([None, False, True]),
    in_channels=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 9),
)
@example(  # one value a channel: Sigma is eps I, and its gradient times x - m is 0 times 1 / eps
    block=dict(num_channels=2, num_iterations=3, reduction=1, eps=1e-5, identity_start=False),
    num_groups=1,
    shape=(1, 1, 1),
    dtype=torch.float32,
    layout='contiguous',
    training=True,
    norm_trains=None,
    in_channels=None,
    seed=0,
)
def test_equals_the_reference(block, num_groups, shape, dtype, layout, training, norm_trains, in_channels, seed):
    """Output and all gradients, for any shape (1x1, one image), dtype and layout, with what is before CE or without."""
    torch.manual_seed(seed)
    channels, (n, h, w) = num_groups * block['num_channels'], shape
    if norm_trains and n * h * w < 8:
        norm_trains = False  # a norm over a few values divides by deviations of next to nothing
    if norm_trains is None:
        in_channels = None  # a convolution comes with a norm
    block = {**block, 'reduction': min(block['reduction'], channels)}
    parts = nn.ModuleDict(dict(ce=randomize(ChannelEquilibrium(channels, **block), seed).train(training)))
    if norm_trains is not None:
        parts['norm'] = randomize(nn.BatchNorm2d(channels), seed).train(norm_trains)
    if in_channels is not None:
        parts['conv'] = randomize(nn.Conv2d(in_channels, channels, 1, bias=False), seed)
    parts.to(dtype)
    parts64 = copy.deepcopy(parts).double()
    x = lay_out(torch.randn(n, in_channels or channels, h, w).to(dtype), layout).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    grad = torch.randn(n, channels, h, w).to(dtype)

    before = dict(norm=parts64['norm'] if 'norm' in parts else None)
    before['conv_weight'] = parts64['conv'].weight if 'conv' in parts else None
    expected = reference(parts64['ce'], x64, **before).out
    expected_grads = torch.autograd.grad(expected, [x64, *parts64.parameters()], grad.double())
    before = {name: parts[name] for name in ('conv', 'norm') if name in parts}
    out = parts['ce'](x, **before)
    grad_x, *grads = torch.autograd.grad(out, [x, *parts.parameters()], grad)

    assert out.dtype == dtype
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert_agree(out, expected, TOLERANCE[dtype], 'out')
    assert_agree(grad_x, expected_grads[0], TOLERANCE[dtype], 'grad_x')
    # together, since one alone may be zero up to rounding
    flat, expected_flat = (torch.cat([g.flatten() for g in gs]) for gs in (grads, expected_grads[1:]))
    assert_agree(flat, expected_flat, TOLERANCE[dtype], 'gradients of the parameters')
