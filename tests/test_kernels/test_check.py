"""The check at first use: it takes the Triton form where that is right, and says why where it is not."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from interpreter import INTERPRETED, take_for_a_gpu
from utils import assert_agree, needs, randomize, reference

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import dispatch, triton_check

pytest_plugins = ('interpreter',)
skipped = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: make test-kernels")
pytestmark = [pytest.mark.kernels, needs('the Triton form on a GPU'), skipped]


@pytest.fixture
def auto(monkeypatch, tmp_path):
    """A machine with a GPU, a driver and an empty cache, that decides by itself."""
    take_for_a_gpu(monkeypatch, 'auto')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    (tmp_path / 'driver').write_text('NVRM version: 1.0')
    monkeypatch.setattr(triton_check, 'DRIVER', tmp_path / 'driver')
    return tmp_path / 'mmdet_ce'


NORM = randomize(torch.nn.BatchNorm2d(32)).eval()


def layer(**kwargs) -> tuple[ChannelEquilibrium, torch.Tensor]:
    return randomize(ChannelEquilibrium(32, **kwargs)).eval(), torch.randn(1, 32, 4, 5)


def taken(ce, x, **kwargs) -> tuple[bool, list[str]]:
    """Return whether a layer takes the Triton form, and what is warned of."""
    dispatch._reported.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        ce(x, NORM, **kwargs)
    return (x.device, None) in dispatch._reported, [str(w.message) for w in caught if 'Equilibrium' in str(w.message)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('d', [16, 32])
@pytest.mark.parametrize('training', [True, False])
def test_right_kernels_pass(auto, tf32, dtype, d, training):
    """With the norm and the end of a residual block folded in; no stream of random numbers moves."""
    ce, x = layer(num_channels=d)
    before = torch.get_rng_state()
    assert taken(ce.train(training), x.to(dtype), residual=x.to(dtype), relu=True) == (True, [])
    assert torch.equal(before, torch.get_rng_state()) and len(list(auto.iterdir())) == 1


def transposed(apply, x, matrix, *rest):
    return apply(x, matrix.mT, *rest)


def three_percent_more(reduce, *args):
    means, scatter = reduce(*args)
    return means, 1.03 * scatter


def not_built(apply, *args):
    raise RuntimeError('Failed to find C compiler.\nPlease specify it by CC.')


@pytest.mark.parametrize(
    ('name', 'plant', 'words'),
    [('apply', transposed, 'y is off'), ('reduce', three_percent_more, 'off by'), ('apply', not_built, 'CC')],
)
@pytest.mark.parametrize('choice', ['auto', 'triton'])
def test_wrong_kernels_are_found(auto, monkeypatch, name, plant, words, choice):
    """By default the network goes on in torch form and warns; who asked for Triton gets an error."""
    from mmdet_ce.ops import triton_maps

    ce, x = layer()
    monkeypatch.setattr(triton_maps, name, functools.partial(plant, getattr(triton_maps, name)))
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    if choice == 'triton':
        with pytest.raises(RuntimeError, match=f'MMDET_CE_KERNELS=triton, but .*{words}'):
            ce.train()(x, NORM)
    else:
        triton, (message,) = taken(ce.train(), x)
        assert not triton and words in message and not auto.exists()


def test_a_passed_check_is_remembered_by_kernels_and_driver(auto, monkeypatch):
    checks = []
    check = triton_check._disagreement
    monkeypatch.setattr(triton_check, '_disagreement', lambda *args: checks.append(args) or check(*args))
    for driver, count in (('1.0', 1), ('1.0', 1), ('2.0', 2), ('1.0', 2)):
        dispatch._verdicts.clear()  # as in another process
        triton_check.DRIVER.write_text(driver)
        assert taken(*layer()) == (True, []) and len(checks) == count
    assert taken(*layer()) == (True, []) and taken(*layer(num_iterations=2)) == (True, []) and len(checks) == 3


@pytest.mark.parametrize('broken', ['folder', 'driver'])
def test_a_cache_that_cannot_be_written_is_no_matter(auto, broken):
    if broken == 'folder':
        auto.write_text('a file where the folder should be')
    else:
        triton_check.DRIVER.unlink()
    assert taken(*layer()) == (True, []) and not auto.is_dir()


def test_a_graph_being_captured_is_not_checked_in(auto, monkeypatch):
    ce, x = layer()
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        triton, messages = taken(ce, x)
        assert not triton and 'captured' in messages[0]
    assert taken(ce, x) == (True, [])


def sync_case():
    """Return a layer, the batch of all processes and a gradient."""
    torch.manual_seed(0)
    ce = randomize(ChannelEquilibrium(32, sync=True))
    x = torch.randn(3, 32, 9, 7) * torch.rand(3, 32, 1, 1) + torch.randn(3, 32, 1, 1)
    return ce, x, torch.randn_like(x)


def work(rank: int, folder) -> None:
    """Run this process's part of the batch and write down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    ce, x, grad = sync_case()
    x, grad = x.split((1, 2))[rank].requires_grad_(), grad.split((1, 2))[rank]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        take_for_a_gpu(patch, 'auto')
        patch.setattr(triton_check, 'DRIVER', folder / 'none')
        if rank == 1:
            patch.setattr(triton_check, 'BOUNDS', {torch.float32: (0.0, 0.0)})
        out = ce(x)
        out.backward(grad)
        taken = [reason is None for _, reason in dispatch._reported]
    gradients = {name: p.grad for name, p in ce.named_parameters()}
    warned = sum('is off by' in str(w.message) for w in caught)
    torch.save(
        dict(out=out.detach(), x=x.grad, gradients=gradients, taken=taken, warned=warned), folder / f'{rank}.pth'
    )
    dist.destroy_process_group()


def test_two_processes_are_one_though_the_check_fails_in_the_second(tmp_path):
    """That takes the torch form and warns; neither waits for the other."""
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    parts = [torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in (0, 1)]
    assert [part['taken'] for part in parts] == [[True], [False]]
    assert [part['warned'] for part in parts] == [0, 1]
    ce, x, grad = sync_case()
    ce, x = copy.deepcopy(ce).double(), x.double().requires_grad_()
    expected = reference(ce, x)
    expected.out.backward(grad.double())
    assert_agree(torch.cat([part['out'] for part in parts]), expected.out.detach(), 2e-5, 'out')
    assert_agree(torch.cat([part['x'] for part in parts]), x.grad, 2e-5, 'x')
    for name, parameter in ce.named_parameters():
        assert_agree(sum(part['gradients'][name] for part in parts), parameter.grad, 5e-5, name)
