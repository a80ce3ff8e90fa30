"""The check at first use: it takes the Triton form where that is right, and says why where it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import take_for_a_gpu
from utils import needs, randomize

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import dispatch, triton_check

pytestmark = [pytest.mark.kernels, needs('the Triton form on a GPU'), pytest.mark.usefixtures('interpreter')]


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
    return (x.device, True) in dispatch._reported, [str(w.message) for w in caught if 'Equilibrium' in str(w.message)]


def forget() -> None:
    """Start anew, as another process."""
    dispatch._verdicts.clear()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('d', [16, 32])
@pytest.mark.parametrize('training', [True, False])
def test_right_kernels_pass(auto, tf32, dtype, d, training):
    """With the norm and the end of a residual block folded in; no stream of random numbers moves."""
    ce, x = layer(num_channels=d)
    before = torch.get_rng_state()
    assert taken(ce.train(training), x.to(dtype), residual=x.to(dtype), relu=True) == (True, [])
    assert torch.equal(before, torch.get_rng_state()) and len(list(auto.iterdir())) == 1


def transposed(real):
    return lambda x, matrix, *rest: real(x, matrix.mT.contiguous(), *rest)


def three_percent_more(real):
    def reduce(*args):
        means, scatter = real(*args)
        return means, 1.03 * scatter

    return reduce


def without_compiler(real):
    def kernel(*args):
        raise RuntimeError('Failed to find C compiler.\nPlease specify it by CC.')

    return kernel


PLANTED = [
    ('apply', transposed, 'y is off'),
    ('reduce', three_percent_more, 'off by'),
    ('apply', without_compiler, 'CC'),
]


@pytest.mark.parametrize(('name', 'plant', 'words'), PLANTED)
@pytest.mark.parametrize('choice', ['auto', 'triton'])
def test_wrong_kernels_are_found(auto, monkeypatch, name, plant, words, choice):
    """A network goes on in torch form, warned once; who asked for Triton gets an error."""
    from mmdet_ce.ops import triton_maps

    ce, x = layer()
    monkeypatch.setattr(triton_maps, name, plant(getattr(triton_maps, name)))
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    if choice == 'triton':
        with pytest.raises(RuntimeError, match=f'MMDET_CE_KERNELS=triton, but .*{words}'):
            ce.train()(x, NORM)
        return
    triton, messages = taken(ce.train(), x)
    assert not triton and len(messages) == 1 and words in messages[0]
    assert not auto.exists()


def test_a_passed_check_is_remembered_by_kernels_and_driver(auto, monkeypatch):
    checks = []
    check = triton_check._disagreement
    monkeypatch.setattr(triton_check, '_disagreement', lambda *args: checks.append(args) or check(*args))
    for driver, count in (('1.0', 1), ('1.0', 1), ('2.0', 2), ('1.0', 2)):
        forget()
        triton_check.DRIVER.write_text(driver)
        assert taken(*layer()) == (True, [])
        assert len(checks) == count
    assert taken(*layer()) == (True, []) and taken(*layer(num_iterations=2)) == (True, []) and len(checks) == 3


@pytest.mark.parametrize('broken', ['a file where the folder should be', 'no driver file', 'no home'])
def test_a_cache_that_cannot_be_written_is_no_matter(auto, monkeypatch, broken):
    if broken == 'no driver file':
        triton_check.DRIVER.unlink()
    elif broken == 'no home':
        monkeypatch.delenv('XDG_CACHE_HOME')
        monkeypatch.setattr(triton_check.Path, 'home', lambda: (_ for _ in ()).throw(RuntimeError('no home')))
    else:
        auto.write_text('')
    assert taken(*layer()) == (True, [])
    assert not auto.is_dir()


def test_a_graph_being_captured_is_not_checked_in(auto, monkeypatch):
    ce, x = layer()
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        triton, messages = taken(ce, x)
        assert not triton and 'captured' in messages[0]
    assert taken(ce, x) == (True, [])
