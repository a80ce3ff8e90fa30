"""The one-matrix form: folding, dtypes, memory formats, what it saves, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from utils import assert_agree, needs, randomize

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import channel_equilibrium, channel_equilibrium_reference, maps, precision


def norm_and_ce(dtype=torch.float64, affine=True, **kwargs):
    norm = randomize(nn.BatchNorm2d(32, affine=affine)).to(dtype).eval()
    return norm, randomize(ChannelEquilibrium(32, **kwargs), seed=1).to(dtype)


@pytest.mark.parametrize('training', [True, False])
def test_fused_form_takes_and_returns_what_the_reference_does(training):
    _, ce = norm_and_ce()
    x = torch.randn(3, 32, 5, 7, dtype=torch.float64)
    running = {} if training else dict(running_whitening=ce.bd.running_whitening, running_scale=ce.ir.running_scale)
    arguments = (x, ce.theta, *ce.ir.gate_parameters)
    out = channel_equilibrium(*arguments, group_size=16, num_iterations=5, eps=1e-3, **running)
    expected = channel_equilibrium_reference(*arguments, group_size=16, num_iterations=5, eps=1e-3, **running)
    for name, a, b in zip(out._fields, out, expected):
        assert (a is None and b is None) or assert_agree(a, b, 1e-10, name) is None
    assert out.out.requires_grad and not out.whitening.requires_grad and not out.scale.requires_grad


def run(function, x, *modules):
    """Return the output and the gradients of the input and of all parameters."""
    for module in modules:
        module.zero_grad()
    x = x.clone().requires_grad_()
    out = function(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out, x.grad, *(p.grad for m in modules for p in m.parameters())


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('identity_start', [True, False])
def test_folded_norm_equals_norm_then_ce(training, affine, identity_start):
    norm, ce = norm_and_ce(affine=affine, identity_start=identity_start)
    ce.train(training)
    other = copy.deepcopy(ce)
    x = 2 * torch.randn(3, 32, 5, 7, dtype=torch.float64) + 1
    folded, expected = run(lambda x: ce(x, norm), x, norm, ce), run(lambda x: other(norm(x)), x, norm, other)
    for a, b in zip(folded, expected):
        assert_agree(a, b, 1e-9)
    for (name, a), b in zip(ce.named_buffers(), other.buffers()):
        assert_agree(a, b, 1e-9, name)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('num_channels', [8, 32])
@pytest.mark.parametrize('samples', [1, 3])
def test_memory_formats_agree(training, num_channels, samples):
    """Output, gradients and running values, with a gradient of either format; and the format is kept."""
    norm, ce = norm_and_ce(num_channels=num_channels)
    ce.train(training)
    x = torch.randn(samples, 32, 5, 7, dtype=torch.float64)
    others = copy.deepcopy(ce), copy.deepcopy(ce)
    expected = run(lambda x: ce(x, norm), x, norm, ce)
    functions = (
        lambda x: others[0](x, norm),
        lambda x: others[1](x, norm).contiguous(),  # whose gradient is contiguous
    )
    for function, other in zip(functions, others):
        actual = run(function, x.to(memory_format=torch.channels_last), norm, other)
        for a, b in zip([*actual, *other.buffers()], [*expected, *ce.buffers()]):
            assert_agree(a, b, 1e-12)
        assert actual[1].is_contiguous(memory_format=torch.channels_last)
    out = ce(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last) and ce(x).is_contiguous()
    strided = torch.randn(2, 64, 5, 7, dtype=torch.float64)[:, ::2]
    assert_agree(copy.deepcopy(ce).eval()(strided), copy.deepcopy(ce).eval()(strided.contiguous()), 1e-12)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Leave 16-bit maps as they are, as on a GPU, with a torch that cannot sum their products in float32."""
    monkeypatch.setattr(precision, 'stays_16_bit', lambda x: x.element_size() == 2)


@pytest.fixture
def moments_as_on_cuda(monkeypatch):
    """Take the moments of 16-bit maps from BatchNorm's function, which on CUDA returns float32."""
    on_cpu = torch.batch_norm_update_stats
    monkeypatch.setattr(torch, 'batch_norm_update_stats', lambda x, *others: on_cpu(x.float(), *others))
    monkeypatch.setattr(maps, '_reads_once', lambda values: values.is_contiguous())


def with_means(shape, means: float) -> torch.Tensor:
    """Return a map whose channels have means of so many deviations."""
    sign = torch.where(torch.arange(shape[1]) % 2 == 0, 1.0, -1.0)
    return torch.randn(shape) + means * sign.view(-1, 1, 1)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('means', [0, 10])
def test_low_precision_errs_by_its_own_rounding(dtype, training, means):
    """Not more than float32's result rounded: statistics, matrices and products are float32."""
    _, ce = norm_and_ce(torch.float32)
    ce.train(training)
    x = with_means((2, 32, 8, 8), means).to(dtype)
    exact = run(copy.deepcopy(ce), x.float(), ce)
    x = x.requires_grad_()
    out = copy.deepcopy(ce)(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
    rounding = torch.finfo(dtype).eps
    assert out.dtype == x.grad.dtype == dtype
    assert_agree(out.float(), exact[0], rounding)
    assert_agree(x.grad.float(), exact[1], 4 * rounding)


@pytest.mark.parametrize(
    'dtype, allowed',
    [(torch.bfloat16, 0.004), pytest.param(torch.float16, 0.0005, marks=needs('float16 under autocast on a CPU'))],
)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('means', [0, 3, 10, 30])
def test_means_cost_a_16_bit_map_no_digits(dtype, allowed, training, means, as_on_cuda, moments_as_on_cuda):
    """The deviation of the error, over that of the output, behind a norm in evaluation: folded, c would cancel M z."""
    norm, ce = norm_and_ce(torch.float32)
    x = with_means((2, 32, 24, 24), means).to(dtype)
    with torch.no_grad():
        norm.running_mean.copy_(x.float().mean((0, 2, 3)))
        norm.running_var.copy_(x.float().var((0, 2, 3)))
        out, expected = (copy.deepcopy(ce).train(training)(z, norm) for z in (x, x.float()))
    assert out.dtype == dtype and (out - expected).std() <= allowed * expected.std()


class Traffic(TorchDispatchMode):
    """Sum the bytes that operations read and write in tensors of the size of a map, in units of the map.

    Note the operations that make such a tensor in float32, too.
    """

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.size, self.unit, self.total = x.numel(), x.numel() * x.element_size(), 0.0
        self.in_float32: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if not is_view and not func.__name__.startswith(('empty', 'new_empty', 'detach')):
            results = result if isinstance(result, tuple) else (result,)
            tensors = [t for t in (*args, *(kwargs or {}).values(), *results) if isinstance(t, torch.Tensor)]
            is_map = isinstance(result, torch.Tensor) and result.numel() >= self.size
            if is_map and result.dtype == torch.float32:
                self.in_float32.append(func.__name__.split('.')[0])
            storages = {t.data_ptr(): t for t in tensors if t.numel() >= self.size and 0 not in t.stride()}
            self.total += sum(t.numel() * t.element_size() for t in storages.values()) / self.unit
        return result


@pytest.mark.parametrize('training, most', [(False, 27), (True, 31)])
def test_a_16_bit_map_is_read_and_written_this_often(training, most, as_on_cuda):
    """Norm, CE, shortcut and ReLU, both passes. Converted to float32 for its covariance alone; not with torch 2.8."""
    norm, ce = norm_and_ce(torch.float32)
    x = torch.randn(2, 32, 24, 24).bfloat16().requires_grad_()
    with Traffic(x) as traffic:
        out = ce.train(training)(x, norm, x.detach().clone(), relu=True)
        out.backward(x.detach().clone())
    assert 20 < traffic.total <= most
    assert traffic.in_float32 == ['_to_copy'] * training


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_saves_nothing_of_its_inputs_size_but_the_input(memory_format):
    norm, ce = norm_and_ce(torch.float32)
    x = torch.randn(2, 32, 64, 64).to(memory_format=memory_format).requires_grad_()
    for training in (True, False):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            ce.train(training)(x, norm)
        assert [t.data_ptr() for t in saved if t.numel() >= x.numel() // 8] == [x.data_ptr()]


def test_gradient_of_theta_keeps_its_digits_near_lambda_one():
    """lambda (1 - lambda) times a difference: 1 - lambda has to stand before the difference."""
    _, ce = norm_and_ce(torch.float32)
    x = torch.randn(2, 32, 16, 16)
    with torch.no_grad():
        ce.theta.fill_(14)
    ce64 = copy.deepcopy(ce).double()
    grad, expected = (run(module, x.to(module.theta.dtype), module)[2] for module in (ce, ce64))
    assert_agree(grad, expected, 1e-2)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_output_may_be_changed_in_place(memory_format):
    """A residual block adds its shortcut in place."""
    _, ce = norm_and_ce()
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64).to(memory_format=memory_format)
    a = run(lambda x: ce.eval()(x) + x, x, ce)
    b = run(lambda x: ce(x).add_(x).relu_(), x, ce)
    assert_agree(b[0], a[0].relu(), 1e-12)


def test_backward_twice_through_a_retained_graph():
    _, ce = norm_and_ce()
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = ce(x).square().sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert_agree(x.grad, 2 * first, 1e-12)


def test_double_backward_is_refused_clearly():
    _, ce = norm_and_ce()
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ce(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


@pytest.mark.parametrize('training', [True, False])
def test_frozen_parameters_and_frozen_input(training):
    norm, ce = norm_and_ce()
    ce.train(training)
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    expected = run(lambda x: copy.deepcopy(ce)(x, norm), x, norm)[1]
    ce.theta.requires_grad_(False)
    norm.requires_grad_(False).zero_grad()
    y = x.clone().requires_grad_()
    ce(y, norm).mul(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum().backward()
    assert_agree(y.grad, expected, 1e-9)
    assert ce.theta.grad is None and norm.weight.grad is None and ce.ir.fc1.weight.grad is not None
    ce.zero_grad()
    ce(x, norm).sum().backward()  # an input without gradient: a frozen layer before CE
    assert ce.ir.fc1.weight.grad is not None


@pytest.mark.parametrize('training', [True, False])
def test_a_large_mean_costs_no_digits(training):
    """Sums of squares about zero would lose four of float32's seven digits here."""
    ce = randomize(ChannelEquilibrium(32)).train(training)
    double = copy.deepcopy(ce).double()
    x = torch.randn(3, 32, 8, 8) + 100 * torch.randn(1, 32, 1, 1)
    expected, out = run(double, x.double(), double), run(ce, x, ce)
    for a, b in zip(out, expected):
        assert_agree(a, b, 1e-4)


def ill_conditioned(shape):
    """Two channel groups whose covariances have condition number 1e6."""
    q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    root = q * torch.logspace(0, -3, 16, dtype=torch.float64) @ q.T
    x = torch.randn(shape, dtype=torch.float64).unflatten(1, (2, 16))
    return torch.einsum('ij,ngjhw->ngihw', root, x).flatten(1, 2)


def rank_deficient(shape):
    mix = torch.randn(shape[1], 3, dtype=torch.float64)
    return torch.einsum('ij,njhw->nihw', mix, torch.randn(shape[0], 3, *shape[2:], dtype=torch.float64))


def equal_channels(shape):
    return torch.randn(shape[0], 1, *shape[2:], dtype=torch.float64).repeat(1, shape[1], 1, 1)


def dead_channels(shape):
    return torch.randn(shape, dtype=torch.float64) * (torch.arange(shape[1]) % 3 > 0).view(-1, 1, 1)


def channels_of_all_scales(shape):
    return torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -6, shape[1], dtype=torch.float64).view(-1, 1, 1)


@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(
    'make', [ill_conditioned, rank_deficient, equal_channels, dead_channels, channels_of_all_scales]
)
def test_adversarial_statistics(make, scale):
    """In float32: finite forward and backward for T up to 40, and float64's values up to T = 20."""
    x = (scale * make((3, 32, 6, 6))).float()
    for num_iterations in (1, 2, 3, 8, 9, 20, 40):
        ce = randomize(ChannelEquilibrium(32, num_iterations=num_iterations))
        results = run(ce, x, ce)
        assert all(torch.isfinite(result).all() for result in (*results, *ce.buffers())), num_iterations
        if num_iterations <= 20:
            double = randomize(ChannelEquilibrium(32, num_iterations=num_iterations)).double()
            expected = run(double, x.double(), double)
            assert_agree(results[0], expected[0], 1e-5, f'out, T = {num_iterations}')
            assert_agree(results[1], expected[1], 1e-4, f'grad_x, T = {num_iterations}')


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('folded', [True, False])
def test_nothing_comes_from_the_host(training, folded):
    """On the meta device an operation with a CPU tensor is an error."""
    norm = torch.nn.BatchNorm2d(32).eval().to('meta')
    ce = ChannelEquilibrium(32, identity_start=True).train(training).to('meta')
    x = torch.zeros(2, 32, 8, 8, device='meta', requires_grad=True)
    ce(x, norm if folded else None, x * 2, relu=True).sum().backward()
    assert x.grad.is_meta and all(p.grad.is_meta for p in ce.parameters())
