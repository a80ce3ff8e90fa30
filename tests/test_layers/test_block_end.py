"""The end of a residual block as one operation, against the oracle, in all modes; and what is taken in."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from utils import assert_agree, needs, randomize, reference

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.layers import block_end as module
from mmdet_ce.layers.block_end import block_end
from mmdet_ce.ops import maps, precision

MODES = list(product([False, True], [False, True]))  # whether the norm trains, and CE
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def small_maps(monkeypatch):
    """Go through the convolution of maps of any size, or never."""
    monkeypatch.setattr(module, 'LEAST_POSITIONS_PER_CHANNEL', 0)


@pytest.fixture(params=['through the convolution', 'convolution apart'])
def path(request, monkeypatch):
    if request.param == 'convolution apart':
        monkeypatch.setattr(module, 'LEAST_POSITIONS_PER_CHANNEL', 10**9)


def make(dtype=torch.float64, width=8, **kwargs) -> nn.ModuleDict:
    """Return a convolution, norm, CE and ReLU of random parameters and running values."""
    torch.manual_seed(0)
    conv = nn.Conv2d(width, 32, 1, bias=False)
    norm = randomize(nn.BatchNorm2d(32), seed=1)
    ce = randomize(ChannelEquilibrium(32, **kwargs), seed=2)
    return nn.ModuleDict(dict(conv=conv, norm=norm, ce=ce, relu=nn.ReLU(inplace=True))).to(dtype)


def inputs(memory_format=torch.contiguous_format, size=(3, 5, 7), width=8, dtype=torch.float64):
    """Return a map and a shortcut, in a memory format."""
    n, height, w = size
    x = torch.randn(n, width, height, w) + torch.randn(1, width, 1, 1)
    tensors = x, torch.randn(n, 32, height, w)
    return [t.to(dtype).contiguous(memory_format=memory_format).requires_grad_() for t in tensors]


def run(end: nn.ModuleDict, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    return block_end(x, end.norm, end.ce, conv=end.conv, shortcut=shortcut, relu=end.relu)


def oracle(end: nn.ModuleDict, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """Return the same from the oracle, which moves the running values of the norm alone."""
    return reference(end.ce, x, conv_weight=end.conv.weight, norm=end.norm, shortcut=shortcut, relu=True).out


def gradients(function, end, tensors) -> dict[str, torch.Tensor]:
    """Return output, gradients and the running values of the norm by name."""
    out = function(end, *tensors)
    wanted = dict(x=tensors[0], shortcut=tensors[1], **dict(end.named_parameters()))
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    values = torch.autograd.grad(out, wanted.values(), grad)
    buffers = {name: buffer for name, buffer in end.norm.named_buffers()}
    return dict(out=out, **dict(zip(wanted, values)), **buffers)


@pytest.mark.parametrize('norm_trains, ce_trains', MODES)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('identity_start', [False, True])
def test_equals_the_oracle(norm_trains, ce_trains, memory_format, identity_start, path):
    end = make(identity_start=identity_start)
    end.norm.train(norm_trains)
    end.ce.train(ce_trains)
    other = copy.deepcopy(end)
    x, shortcut = inputs(memory_format)
    actual = gradients(run, end, (x, shortcut))
    expected = gradients(oracle, other, (x, shortcut))
    for name, value in expected.items():
        assert_agree(actual[name], value, 1e-10, name)
    assert actual['out'].is_contiguous(memory_format=memory_format)
    statistics = reference(
        copy.deepcopy(other.ce), other.norm.eval()(other.conv(x))
    )  # the same where the norm is fixed
    if ce_trains and not norm_trains:
        assert_agree(end.ce.bd.running_mean, torch.lerp(other.ce.bd.running_mean, statistics.mean, 0.1), 1e-10)
        moved = torch.lerp(other.ce.bd.running_whitening, statistics.whitening, 0.1)
        assert_agree(end.ce.bd.running_whitening, moved, 1e-10)


@pytest.mark.parametrize('norm_trains, ce_trains', MODES)
@pytest.mark.parametrize('memory_format', FORMATS)
def test_gradcheck(norm_trains, ce_trains, memory_format, path):
    end = make(width=4)
    end.norm.train(norm_trains)
    end.ce.train(ce_trains)
    names, parameters = zip(*((n, p) for n, p in end.named_parameters() if not n.startswith('ce.ir.fc')))

    def function(x, shortcut, *values):
        with torch.no_grad():  # gradcheck perturbs the values in place
            assert all(value is parameter for value, parameter in zip(values, parameters)), names
        return run(end, x, shortcut)

    x, shortcut = inputs(memory_format, size=(2, 3, 2), width=4)
    assert torch.autograd.gradcheck(function, (x, shortcut, *parameters), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize('training', [True, False])
def test_the_mode_may_change_before_the_backward_pass(training, path):
    gradients = []
    for changes in (False, True):
        end = make().train(training)
        out = run(end, *inputs())
        end.train(training != changes)
        out.square().sum().backward()
        gradients.append([p.grad for p in end.parameters()])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


@pytest.mark.parametrize('size', [(0, 3, 4), (1, 1, 1), (1, 3, 4), (3, 1, 1)])
@pytest.mark.parametrize('norm_trains, ce_trains', MODES)
def test_parts_of_size_0_and_1(size, norm_trains, ce_trains, path):
    """BatchNorm refuses a single value; of none, the running values stay and the gradients are 0."""
    end = make()
    end.norm.train(norm_trains)
    end.ce.train(ce_trains)
    tensors = inputs(size=size)
    before = copy.deepcopy(end.ce.state_dict())
    if size == (1, 1, 1) and norm_trains:
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            run(end, *tensors)
        return
    other = copy.deepcopy(end)
    actual = gradients(run, end, tensors)
    if size[0] == 0:
        assert actual['out'].shape == (0, 32, 3, 4)
        assert all((actual[name] == 0).all() for name, _ in end.named_parameters())
        assert all(torch.equal(value, before[name]) for name, value in end.ce.state_dict().items())
        return
    expected = gradients(oracle, other, tensors)
    for name, value in expected.items():
        if value.abs().max() > 1e-9 or name == 'out':
            assert_agree(actual[name], value, 1e-8, name)


@pytest.mark.parametrize('kwargs', [{}, dict(momentum=None), dict(track_running_stats=False), dict(affine=False)])
def test_a_norm_that_trains_moves_as_torchs(kwargs, path):
    end = make()
    end['norm'] = nn.BatchNorm2d(32, **kwargs).double()
    other = copy.deepcopy(end)
    for _ in range(3):
        x, shortcut = inputs()
        run(end, x, shortcut)
        other.norm(other.conv(x))
    for (name, value), expected in zip(end.norm.named_buffers(), other.norm.buffers()):
        assert_agree(value, expected, 1e-12, name)


@pytest.mark.parametrize('training', [True, False])
def test_a_norm_that_stops_tracking_uses_its_running_values_as_torchs(training, path):
    end = make().train(training)
    end.norm.track_running_stats = False
    other = copy.deepcopy(end)
    tensors = inputs()
    actual = gradients(run, end, tensors)
    for name, expected in gradients(oracle, other, tensors).items():
        assert_agree(actual[name], expected, 1e-10, name)


def test_a_recomputed_pass_counts_as_in_mmdets_block(path):
    """torch's checkpoint runs the block twice: BatchNorm's running values move twice, CE's once."""
    end = make()
    x, shortcut = inputs()
    checkpoint(run, end, x, shortcut, use_reentrant=False).sum().backward()
    assert end.norm.num_batches_tracked == 2
    once = make()
    run(once, x, shortcut)
    assert_agree(end.ce.bd.running_whitening, once.ce.bd.running_whitening, 1e-12)


def is_called(part: nn.Module, end: nn.ModuleDict) -> bool:
    """Return whether a part of a block end is called as a module."""
    calls = []
    cls = type(part)
    forward = cls.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cls, 'forward', lambda self, *args, **kwargs: calls.append(self) or forward(self, *args, **kwargs)
        )
        run(end, *inputs())
    return any(call is part for call in calls)


class OwnConv(nn.Conv2d):
    """A class of the user's."""


def hooked(conv):
    conv.register_forward_hook(lambda *args: None)
    return conv


def with_own_forward(conv):
    conv.forward = conv.forward
    return conv


OTHERS = {
    'hook': lambda: hooked(nn.Conv2d(8, 32, 1, bias=False)),
    'own forward': lambda: with_own_forward(nn.Conv2d(8, 32, 1, bias=False)),
    'own class': lambda: OwnConv(8, 32, 1, bias=False),
    'bias': lambda: nn.Conv2d(8, 32, 1),
    'groups': lambda: nn.Conv2d(8, 32, 1, groups=2, bias=False),
    '3x3': lambda: nn.Conv2d(8, 32, 3, padding=1, bias=False),
    'padding': lambda: nn.Sequential(nn.Conv2d(8, 32, 1, padding=1, bias=False), nn.AvgPool2d(3, 1)),
    'pruned': lambda: prune.random_unstructured(nn.Conv2d(8, 32, 1, bias=False), 'weight', 0.5),
    'parametrized': lambda: parametrizations.weight_norm(nn.Conv2d(8, 32, 1, bias=False)),
}


@pytest.mark.parametrize('name', OTHERS)
@pytest.mark.parametrize('training', [True, False])
def test_another_convolution_is_called_on_its_own(name, training):
    end = make().train(training)
    assert not is_called(end.conv, end)
    end['conv'] = OTHERS[name]().double()
    x, shortcut = inputs()
    other = copy.deepcopy(end) if name not in ('pruned', 'parametrized') else end
    expected = torch.relu(other.ce(other.norm(other.conv(x))) + shortcut)
    assert_agree(run(end, x, shortcut), expected, 1e-10)
    if name not in ('own forward', 'pruned', 'parametrized'):
        assert is_called(end.conv, end)


def test_a_convolution_in_tf32_is_called_on_its_own(monkeypatch):
    monkeypatch.setattr(module, 'convolves_faster', lambda x: True)
    end = make()
    assert is_called(end.conv, end)


@pytest.mark.parametrize('part', ['norm', 'ce', 'relu'])
def test_a_hook_sees_its_module_called(part):
    end = make()
    end['relu'] = nn.ReLU()  # torch forbids to change in place what a backward hook has seen
    seen = []
    end[part].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    end[part].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].shape))
    run(end, *inputs()).sum().backward()
    assert seen == [(3, 32, 5, 7)] * 2


def test_frozen_parameters_have_no_gradient(path):
    end = make()
    x, shortcut = inputs()
    end.conv.requires_grad_(False)
    end.norm.requires_grad_(False)
    end.ce.theta.requires_grad_(False)
    run(end, x.detach(), shortcut).sum().backward()
    frozen = {name for name, p in end.named_parameters() if p.grad is None}
    assert frozen == {'conv.weight', 'norm.weight', 'norm.bias', 'ce.theta'}


def test_weights_that_are_not_contiguous(path):
    end = make()
    x, shortcut = inputs()
    expected = run(end.eval(), x, shortcut)
    end.conv.weight.data = end.conv.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    end.ce.ir.fc1.weight.data = end.ce.ir.fc1.weight.data.T.contiguous().T
    assert_agree(run(end, x, shortcut), expected, 1e-12)


def test_keeps_the_map_and_the_output_alone():
    end = make(torch.float32)
    saved = []
    x, shortcut = inputs(size=(2, 64, 64), dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = run(end, x, shortcut)
    assert {t.data_ptr() for t in saved if t.numel() >= x.numel() // 2} == {x.data_ptr(), out.data_ptr()}


@pytest.mark.parametrize(
    'dtype', [torch.bfloat16, pytest.param(torch.float16, marks=needs('float16 under autocast on a CPU'))]
)
def test_autocast(dtype, path):
    """The dtype of the output is that of the parts apart; parameters and running values stay float32."""
    end = make(torch.float32)
    x, shortcut = inputs(dtype=torch.float32)
    expected = run(copy.deepcopy(end), x, shortcut)
    with torch.autocast('cpu', dtype=dtype):
        out = run(end, x.to(dtype), shortcut.to(dtype))
        assert run(end, x, shortcut.to(dtype)).dtype == dtype
    out.float().sum().backward()
    assert out.dtype == dtype and end.conv.weight.grad.dtype == torch.float32
    assert_agree(out.float(), expected, 4 * torch.finfo(dtype).eps)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Leave 16-bit maps as they are, as on a GPU whose torch sums their products in float32."""
    monkeypatch.setattr(precision, 'stays_16_bit', lambda x: x.element_size() == 2)
    monkeypatch.setattr(maps, '_sums_of_products', lambda left, right: left.float() @ right.float().mT)


@pytest.mark.parametrize('norm_trains, ce_trains', MODES)
@pytest.mark.parametrize('means', [0, 3, 10, 30])
@pytest.mark.parametrize('goes_through', [True, False])
def test_means_cost_a_16_bit_map_no_digits(means, norm_trains, ce_trains, goes_through, as_on_cuda):
    """The deviation of the error over that of the value, for channels whose mean is so many deviations."""
    end = make(torch.float32, width=16 if goes_through else 32)
    end.norm.train(norm_trains)
    end.ce.train(ce_trains)
    conv = end.conv if goes_through else None
    channels = 16 if goes_through else 32
    signs = torch.where(torch.arange(channels) % 2 == 0, 1.0, -1.0).view(-1, 1, 1)
    x = (torch.randn(2, channels, 24, 24) + means * signs).bfloat16()
    shortcut, grad = (torch.randn(2, 32, 24, 24).bfloat16() for _ in range(2))
    with torch.no_grad():
        z = end.conv(x.float()) if goes_through else x.float()
        end.norm.running_mean.copy_(z.mean((0, 2, 3)))
        end.norm.running_var.copy_(z.var((0, 2, 3)))
    outs, grads = [], []
    for dtype in (torch.bfloat16, torch.float32):
        other = copy.deepcopy(end)
        h = x.clone().to(dtype).requires_grad_()
        out = block_end(h, other.norm, other.ce, conv=conv, shortcut=shortcut.to(dtype))
        out.backward(grad.to(dtype))
        outs.append(out.detach().float())
        grads.append(h.grad.float())
    assert (outs[0] - outs[1]).std() <= 0.003 * outs[1].std()
    if means <= 10:
        assert (grads[0] - grads[1]).std() <= 0.007 * grads[1].std()
