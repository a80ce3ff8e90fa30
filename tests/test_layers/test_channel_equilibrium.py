"""ChannelEquilibrium against the released code, against the plain reference, and at its edges."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from utils import assert_agree, needs, randomize

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.checkpoints.official import BLOCK_NAMES, convert_official_state_dict


@pytest.mark.parametrize('name', ['c32_d16', 'c48_d32', 'c64_d64'])
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_block_agrees_with_released_code(golden, name, mode):
    data = np.load(golden / f'ce_block_{name}.npz')
    state = {key[6:]: torch.from_numpy(data[key]) for key in data.files if key.startswith('state.')}
    ce = ChannelEquilibrium(data['x'].shape[1], num_channels=int(data['num_channels']))
    ce.load_state_dict(convert_official_state_dict(state))
    ce.train(mode == 'train')

    x = torch.from_numpy(data['x']).requires_grad_()
    out = ce(x)
    out.backward(torch.from_numpy(data['grad_out']))

    assert_agree(out, data[f'{mode}_out'], 1e-4, 'out')
    assert_agree(x.grad, data[f'{mode}_grad_x'], 1e-4, 'grad_x')
    if mode == 'train':
        buffers, parameters = dict(ce.named_buffers()), dict(ce.named_parameters())
        for official, ours in BLOCK_NAMES.items():
            if ours in buffers:
                assert_agree(buffers[ours], data[f'train_buffer.{official}'], 1e-4, ours)
            else:
                assert_agree(parameters[ours].grad, data[f'train_grad.{official}'], 1e-4, ours)
    else:
        for official, ours in BLOCK_NAMES.items():
            assert torch.equal(ce.state_dict()[ours], state[official]), f'evaluation changed {ours}'


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('identity_start', [False, True])
def test_gradcheck(training, identity_start):
    ce = ChannelEquilibrium(8, num_channels=4, identity_start=identity_start)
    ce = randomize(ce).double().train(training)
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*ce.named_parameters())

    def forward(x, *values):
        return torch.func.functional_call(copy.deepcopy(ce), dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *(p.detach().requires_grad_() for p in parameters)))


@pytest.mark.parametrize('training', [True, False])
def test_identity_start(training):
    """At first the input, exactly; only alpha has a gradient then, and moves."""
    ce = ChannelEquilibrium(32, identity_start=True).train(training)
    x = torch.randn(2, 32, 5, 5)
    out = ce(x)
    assert torch.equal(out, x) and ce.is_identity
    out.square().sum().backward()
    assert ce.alpha.grad.abs() > 1e-3 and not ce.theta.grad.any()
    with torch.no_grad():
        ce.alpha.add_(0.1)
    assert not torch.allclose(ce(x), x) and not ce.is_identity
    with torch.no_grad():
        ce.alpha.fill_(1.0)
    alone = ChannelEquilibrium(32).train(training)
    alone.load_state_dict({key: t for key, t in ce.state_dict().items() if key != 'alpha'})
    assert_agree(ce(x), alone(x), 1e-6)


def test_branches_are_what_the_paper_says():
    """lambda = 1 leaves batch decorrelation alone, lambda = 0 instance reweighting."""
    ce = ChannelEquilibrium(32, num_iterations=20).double()
    x = torch.randn(4, 32, 16, 16, dtype=torch.float64)
    x[:, 1] += x[:, 0]  # two correlated channels

    def offdiagonal(y):
        y = y.transpose(0, 1).flatten(1)[:16]
        return torch.corrcoef(y).fill_diagonal_(0).abs().max()

    with torch.no_grad():
        ce.theta.fill_(50.0)
        assert offdiagonal(x) > 0.6
        assert offdiagonal(ce(x)) < 0.01
        ce.theta.fill_(-50.0)
        ratio = ce(x) / x
    assert_agree(ratio.amax((2, 3)), ratio.amin((2, 3)), 1e-9, 'one factor a sample and channel')


FLOAT16 = pytest.param(torch.float16, marks=needs('float16 under autocast on a CPU'))


@pytest.mark.parametrize('dtype', [FLOAT16, torch.bfloat16])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_autocast_keeps_statistics_in_float32(dtype, scale):
    ce, plain = ChannelEquilibrium(32), ChannelEquilibrium(32)
    plain.load_state_dict(ce.state_dict())
    x = (scale * (torch.randn(2, 32, 8, 8) + 10)).to(dtype)
    with torch.autocast('cpu', dtype=dtype):
        out = ce(x)
    plain(x.float())
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    for (name, a), b in zip(ce.named_buffers(), plain.buffers()):
        assert torch.equal(a, b), name


def test_evaluation_leaves_buffers_alone():
    ce = randomize(ChannelEquilibrium(32)).eval()
    before = copy.deepcopy(ce.state_dict())
    ce(torch.randn(2, 32, 4, 4)).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in ce.state_dict().items())


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 3e38])
@pytest.mark.parametrize('positions', [slice(1), slice(None)], ids=['a position', 'a channel'])
@pytest.mark.parametrize('num_iterations', [1, 3])
def test_a_batch_that_is_not_finite_leaves_the_running_values(value, positions, num_iterations):
    """A loss scaler skips its step, and BatchNorm in evaluation keeps nothing of it."""
    ce = randomize(ChannelEquilibrium(32, num_iterations=num_iterations)).train()
    before = copy.deepcopy(ce.state_dict())
    x = torch.randn(2, 32, 4, 4)
    x[0, 5, positions] = value
    ce(x)
    assert all(torch.equal(before[k], v) for k, v in ce.state_dict().items())
    ce(torch.randn(2, 32, 4, 4))
    assert not any(torch.equal(before[k], v) for k, v in ce.named_buffers())


def test_num_channels_is_halved_until_it_divides():
    assert ChannelEquilibrium(48, num_channels=32).group_size == 16
    assert ChannelEquilibrium(24).group_size == 8
    assert ChannelEquilibrium(64, num_channels=64).bd.running_whitening.shape == (1, 64, 64)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(in_channels=17), 'in_channels=17 cannot be grouped'),
        (dict(in_channels=0), 'in_channels must be an integer of at least 1, got 0'),
        (dict(in_channels=32, num_channels=0), 'num_channels must be an integer of at least 2, got 0'),
        (dict(in_channels=32, num_channels=1), 'num_channels must be an integer of at least 2, got 1'),
        (dict(in_channels=32, num_iterations=2.5), 'num_iterations must be an integer of at least 1, got 2.5'),
        (dict(in_channels=32, reduction='4'), "reduction must be an integer of at least 1, got '4'"),
        (dict(in_channels=2, num_channels=2), 'reduction must be between 1 and in_channels=2, got 4'),
        (dict(in_channels=32, eps=0.0), r'eps must be in \(0, 1\], got 0.0'),
        (dict(in_channels=32, eps=float('nan')), r'eps must be in \(0, 1\], got nan'),
        (dict(in_channels=32, momentum=0.0), r'momentum must be in \(0, 1\]'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChannelEquilibrium(**arguments)


FLOAT8 = getattr(torch, 'float8_e4m3fn', torch.int8)


@pytest.mark.parametrize(
    'x, got',
    [(torch.zeros(s), s) for s in [(2, 32, 4), (2, 32, 4, 4, 4), (2, 16, 4, 4)]]
    + [(torch.zeros(2, 32, 4, 4).to(dtype), dtype) for dtype in (torch.int64, torch.bool, torch.complex64, FLOAT8)]
    + [(torch.zeros(2, 32, 4, 4).to_sparse(), 'torch.sparse_coo')],
)
def test_bad_input(x, got):
    with pytest.raises(ValueError, match=rf'expects a dense tensor, \(N, 32, H, W\).* got .*{re.escape(str(got))}'):
        ChannelEquilibrium(32)(x)


def test_state_dict_keys():
    """Renaming one breaks users' checkpoints."""
    assert [*ChannelEquilibrium(32).state_dict()] == [
        'theta',
        'bd.running_mean',
        'bd.running_whitening',
        'ir.running_scale',
        'ir.fc1.weight',
        'ir.norm.weight',
        'ir.norm.bias',
        'ir.fc2.weight',
    ]
