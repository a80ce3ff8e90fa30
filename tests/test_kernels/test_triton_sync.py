"""Two processes share their statistics; where the check fails in one, that takes the torch form, and both go on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from conftest import take_for_a_gpu
from utils import assert_agree, needs, randomize, reference

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.ops import dispatch, triton_check

pytestmark = [pytest.mark.kernels, needs('the Triton form on a GPU'), pytest.mark.usefixtures('interpreter')]


def make_case():
    """Return a layer, the batch of all processes and a gradient."""
    torch.manual_seed(0)
    ce = randomize(ChannelEquilibrium(32, sync=True))
    x = torch.randn(3, 32, 9, 7) * torch.rand(3, 32, 1, 1) + torch.randn(3, 32, 1, 1)
    return ce, x, torch.randn_like(x)


def work(rank: int, folder) -> None:
    """Run this process's part of the batch and write down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    ce, x, grad = make_case()
    x, grad = x.split((1, 2))[rank].requires_grad_(), grad.split((1, 2))[rank]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        take_for_a_gpu(patch, 'auto')
        patch.setattr(triton_check, 'DRIVER', folder / 'none')
        if rank == 1:
            patch.setattr(triton_check, 'BOUNDS', {torch.float32: (0.0, 0.0)})
        out = ce(x)
        out.backward(grad)
        taken = [triton for _, triton in dispatch._reported]
    gradients = {name: p.grad for name, p in ce.named_parameters()}
    results = dict(out=out.detach(), x=x.grad, gradients=gradients, buffers=dict(ce.named_buffers()), taken=taken)
    results['warned'] = sum('is off by' in str(w.message) for w in caught)
    torch.save(results, folder / f'{rank}.pth')
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    parts = [torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in (0, 1)]
    assert [part['taken'] for part in parts] == [[True], [False]]
    assert [part['warned'] for part in parts] == [0, 1]
    ce, x, grad = make_case()
    ce, x = copy.deepcopy(ce).double(), x.double().requires_grad_()
    expected = reference(ce, x)
    expected.out.backward(grad.double())
    assert_agree(torch.cat([part['out'] for part in parts]), expected.out.detach(), 2e-5, 'out')
    assert_agree(torch.cat([part['x'] for part in parts]), x.grad, 2e-5, 'x')
    for name, parameter in ce.named_parameters():
        assert_agree(sum(part['gradients'][name] for part in parts), parameter.grad, 5e-5, name)
    ce._update(expected.mean.detach(), expected.whitening.detach(), expected.scale.detach())
    for name, buffer in ce.named_buffers():
        for part in parts:
            assert_agree(part['buffers'][name], buffer, 5e-5, name)
