"""Time Channel Equilibrium on the CPU: the block against the released form, the backbone against mmdet's ResNet.

All candidates run in one process, in turn, so that what else the machine does touches them alike. On GPUs: gpu_run.py.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import command_line  # noqa: F401  (sets variables of OpenMP's)

import torch
from benchmark.models import ReleasedForm, RivalResNet, with_released_form
from compare import processor
from mmdet.models import ResNet
from torch import Tensor, nn

from mmdet_ce import CEResNet, ChannelEquilibrium, __version__

BLOCKS = {(2, 64, 160, 160): 64, (2, 256, 80, 80): 16, (2, 512, 40, 40): 16, (2, 1024, 20, 20): 16}  # input: d


def interleaved(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Run every candidate once a round and return the seconds of each run by name; one round more warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for backward, each storage once, parameters and input aside."""
    aside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in aside:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that kept its own output would never be freed, nor would its graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x)
        total = sum(saved.values())
    del outputs
    return total


def train_step(model: nn.Module, x: Tensor, gradients: dict) -> None:
    """Run forward and backward of one step; the gradients that it starts from are made once."""
    model.zero_grad(set_to_none=True)
    x.grad, outputs = None, model(x)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
    for out in outputs:  # none of frozen stages
        gradients.setdefault(out.shape, torch.randn_like(out))
    torch.autograd.backward(outputs, [gradients[out.shape] for out in outputs])


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[str]]:
    """Return for each candidate its median in ms, and median and quartiles of its time over the first one's.

    By round, so that a machine that slows down for a while does not pass for a difference.
    """
    first = next(iter(seconds.values()))
    cells = {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times, first)], n=4)
        cells[name] = [f'{1e3 * statistics.median(times):.1f}', f'{middle:.3f} ({low:.2f}-{high:.2f})']
    return cells


def time_models(title: str, models: dict[str, nn.Module], x: Tensor, rounds: int) -> None:
    """Time models and print their table."""
    gradients: dict = {}
    for model in models.values():
        model.train()  # mmdet's returns nothing
    memory = {name: bytes_saved(model, x) / 1e6 for name, model in models.items()}
    trained = {name: lambda model=model: train_step(model, x, gradients) for name, model in models.items()}
    steps = ratios(interleaved(trained, rounds))
    for model in models.values():
        model.eval()
    with torch.no_grad():
        forward = ratios(interleaved({name: lambda model=model: model(x) for name, model in models.items()}, rounds))
    columns = ['train step, ms', 'ratio (quartiles)', 'inference, ms', 'ratio (quartiles)', 'saved for backward, MB']
    print(f'\n{title}\n\n| | {" | ".join(columns)} | ratio |\n|{" --- |" * 7}')
    for name in models:
        cells = [*steps[name], *forward[name], f'{memory[name]:.1f}', f'{memory[name] / [*memory.values()][0]:.3f}']
        print(f'| {name} | {" | ".join(cells)} |', flush=True)


def compare_blocks(rounds: int) -> None:
    """Compare the block with the released form and with BatchNorm."""
    for shape, d in BLOCKS.items():
        ce = ChannelEquilibrium(shape[1], num_channels=d)
        released = ReleasedForm(copy.deepcopy(ce))
        models = {'CE, released form': released, 'CE': ce, 'BatchNorm2d': nn.BatchNorm2d(shape[1])}
        time_models(f'block {"x".join(map(str, shape))}, d = {d}', models, torch.randn(shape).requires_grad_(), rounds)


def compare_backbones(args: argparse.Namespace) -> None:
    """Compare the backbone with mmdet's plain ResNet, the released form of CE, and other blocks."""
    x = torch.randn(args.batch, 3, *args.size)
    models = {'plain ResNet': ResNet(args.depth), 'CE': CEResNet(args.depth)}
    models['CE'].load_state_dict(models['plain ResNet'].state_dict(), strict=False)
    with torch.no_grad():  # CE needs statistics before it is evaluated
        for _, layer in models['CE'].named_ce():
            layer.train()
        models['CE'](x)
    models['CE, ce_eval=False'] = CEResNet(args.depth, ce_eval=False)
    models['CE, ce_eval=False'].load_state_dict(models['CE'].state_dict())
    models.update({f'{name}, released form': with_released_form(model) for name, model in [*models.items()][1:]})
    if args.rivals:
        models['plain + ContextBlock'] = RivalResNet(args.depth, 'gc')
        models['plain + SE'] = RivalResNet(args.depth, 'se')
    time_models(f'ResNet-{args.depth}, norms in evaluation, {"x".join(map(str, x.shape))}', models, x, args.rounds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--what', nargs='+', choices=['block', 'backbone'], default=['block', 'backbone'])
    parser.add_argument('--depth', type=int, default=50, help='(default: %(default)s)')
    parser.add_argument('--batch', type=int, default=2, help='images in the backbone input (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs=2, default=[320, 480], help='height, width (default: 320 480)')
    parser.add_argument('--rivals', action='store_true', help='with ContextBlock and SE in the plain backbone, too')
    parser.add_argument('--rounds', type=int, default=15, help='timed rounds, 2 or more (default: %(default)s)')
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f'{processor()}, {torch.get_num_threads()} threads; torch {torch.__version__}, mmdet_ce {__version__}')
    if 'block' in args.what:
        compare_blocks(args.rounds)
    if 'backbone' in args.what:
        compare_backbones(args)


if __name__ == '__main__':
    main()
