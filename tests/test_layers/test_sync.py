"""CE over several processes: what they compute together is what one process computes from the whole batch."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import SyncBuffersHook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from utils import assert_agree, randomize

from mmdet_ce import CEResNet, ChannelEquilibrium

pytestmark = pytest.mark.xdist_group('sync')  # one worker, one pair of processes

SPLITS = {'even': (2, 2), 'uneven': (1, 3), 'one empty': (0, 4)}  # samples of each process
CASES = ['plain', 'checkpointed', 'folded norm', 'identity start', 'float32']


def make_case(case: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Return norm and layer, a batch whose samples differ in mean and scale, and the weights of a loss."""
    torch.manual_seed(0)
    ce = randomize(ChannelEquilibrium(32, num_channels=8, sync=True, identity_start=case == 'identity start'))
    norm = randomize(torch.nn.BatchNorm2d(32)).eval() if case == 'folded norm' else torch.nn.Identity()
    x = torch.randn(4, 32, 6, 5) * torch.rand(4, 32, 1, 1) + torch.randn(4, 32, 1, 1)
    layer = torch.nn.ModuleList([norm, ce])
    dtype = torch.float32 if case == 'float32' else torch.float64
    return layer.to(dtype), x.to(dtype), torch.randn_like(x, dtype=dtype)


def run_case(case: str, layer: torch.nn.ModuleList, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return output, gradients and buffers of one step."""
    norm, ce = layer
    x = x.clone().requires_grad_()
    norm = norm if case == 'folded norm' else None
    run = partial(checkpoint, ce, use_reentrant=False) if case == 'checkpointed' else ce
    out = run(x, norm=norm)
    (out * weights).sum().backward()
    result = {'out': out.detach(), 'grad': x.grad, **{f'grad.{n}': p.grad for n, p in layer.named_parameters()}}
    return {**result, **{f'buffer.{n}': b for n, b in layer.named_buffers()}}


def make_backbone(sync: bool) -> tuple[CEResNet, torch.Tensor]:
    """Return a backbone of frozen norms, and a batch."""
    torch.manual_seed(1)
    backbone = CEResNet(
        18, base_channels=16, frozen_stages=-1, ce_eval=False, with_cp=True, ce_cfg=dict(num_channels=16, sync=sync)
    )
    return backbone.train().double(), torch.randn(4, 3, 64, 64, dtype=torch.float64)


def step(backbone: torch.nn.Module, images: torch.Tensor) -> float:
    """Take one step on the mean over samples of a loss, and return the loss."""
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    loss = torch.stack([out.square().mean() for out in backbone(images)]).sum()
    loss.backward()
    optimizer.step()
    return loss.item()


def ragged(rank: int) -> dict[str, torch.Tensor]:
    """Return the buffers for maps of a size of their own, and the loss's slope along x and by differences."""
    layer, _, _ = make_case('folded norm')
    x, weights, direction = (t.double() for t in torch.randn(3, 2 + rank, 32, 4 + rank, 5 - 2 * rank))
    layers = [copy.deepcopy(layer) for _ in range(3)]
    slope = (run_case('folded norm', layers[0], x, weights)['grad'] * direction).sum()
    up, down = (
        (run_case('folded norm', other, x + step * direction, weights)['out'] * weights).sum()
        for other, step in zip(layers[1:], (1e-5, -1e-5))
    )
    normed = layer[0](x).transpose(0, 1).flatten(1)
    return dict(slope=slope, difference=(up - down) / 2e-5, normed=normed, mean=layers[0][1].bd.running_mean)


def work(rank: int, folder: Path) -> None:
    """Do this process's part of everything that is compared, and write it down."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    results = {}
    for split, sizes in SPLITS.items():
        for case in CASES:
            layer, x, weights = make_case(case)
            results[split, case] = run_case(case, layer, x.split(sizes)[rank], weights.split(sizes)[rank])
    for sync in (True, False):
        backbone, images = make_backbone(sync)
        model = DistributedDataParallel(backbone, broadcast_buffers=False)  # as mmengine wraps
        losses = [step(model, images.split(2)[rank]) for _ in range(3)]
        results['backbone', sync] = dict(losses=losses, state=copy.deepcopy(backbone.state_dict()))
    SyncBuffersHook().after_train_epoch(SimpleNamespace(model=model))
    results['after the hook'] = backbone.state_dict()
    results['other sizes'] = ragged(rank)
    # Evaluation exchanges nothing with other processes: one of them may run it alone.
    if rank == 0:
        layer, x, _ = make_case('plain')
        results['evaluation'] = layer[1].eval()(x)
    torch.save(results, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def processes(tmp_path_factory) -> list[dict]:
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp('processes')
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f'{rank}.pth', weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('split', SPLITS)
def test_two_processes_are_one(processes, split, case):
    whole = run_case(case, *make_case(case))
    parts = [p[split, case] for p in processes]
    tolerance = 1e-5 if case == 'float32' else 1e-10
    for name, expected in whole.items():
        if name in ('out', 'grad'):
            actual = torch.cat([part[name] for part in parts])
        elif name.startswith('grad.'):
            actual = sum(part[name] for part in parts)
        else:
            assert torch.equal(parts[0][name], parts[1][name]), name
            actual = parts[0][name]
        assert_agree(actual, expected, tolerance, name)


@pytest.mark.slow
def test_a_network_in_ddp_trains_as_in_one_process(processes):
    backbone, images = make_backbone(sync=True)
    losses = [step(backbone, images) for _ in range(3)]
    parts = [p['backbone', True] for p in processes]
    for name, expected in backbone.state_dict().items():
        assert torch.equal(parts[0]['state'][name], parts[1]['state'][name]), name
        assert_agree(parts[0]['state'][name], expected, 1e-9, name)
    assert_agree(torch.tensor([p['losses'] for p in parts]).mean(0), torch.tensor(losses), 1e-9)


@pytest.mark.slow
def test_the_frameworks_hook_gives_each_process_the_mean_of_the_statistics(processes):
    before = [p['backbone', False]['state'] for p in processes]
    after = [p['after the hook'] for p in processes]
    own = 'layer1.0.ce.bd.running_whitening'
    assert not torch.equal(before[0][own], before[1][own])
    for name, value in after[0].items():
        assert torch.equal(value, after[1][name]), name
        assert_agree(value, (before[0][name] + before[1][name]) / 2, 1e-12, name)


@pytest.mark.slow
def test_maps_of_other_sizes_count_by_their_positions(processes):
    parts = [p['other sizes'] for p in processes]
    layer, _, _ = make_case('folded norm')
    mean = torch.cat([part['normed'] for part in parts], dim=1).mean(1).view(4, 8, 1)
    assert_agree(parts[0]['mean'], 0.9 * layer[1].bd.running_mean + 0.1 * mean, 1e-12)
    assert_agree(parts[0]['slope'] + parts[1]['slope'], parts[0]['difference'] + parts[1]['difference'], 1e-7)


@pytest.mark.slow
def test_evaluation_asks_nobody(processes):
    layer, x, _ = make_case('plain')
    assert_agree(processes[0]['evaluation'], layer[1].eval()(x), 1e-12)
