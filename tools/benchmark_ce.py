"""Time Channel Equilibrium: the block against the released form and BatchNorm, the backbone against mmdet's ResNet.

All candidates of a comparison run in one process, one after the other in every round, so that what else the machine
does touches them alike. Prints a table in Markdown for each comparison; the first row is what the others are over.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import command_line  # noqa: F401  (sets variables of OpenMP's)

import torch
from benchmark.models import ReleasedForm, RivalResNet, with_released_form
from compare import processor
from mmdet.models import ResNet
from torch import Tensor, nn

from mmdet_ce import CEResNet, ChannelEquilibrium, __version__

# how a backbone is trained; 'coco' is the default of mmdet's configs
MODES = {
    'norm_eval': dict(norm_eval=True),
    'coco': dict(norm_eval=True, frozen_stages=1),
    'batch': dict(norm_eval=False),
}
BLOCK_SHAPES = ['2x64x160x160d64', '2x256x80x80d16', '2x512x40x40d16', '2x1024x20x20d16']


def interleaved(candidates: dict[str, Callable[[], None]], rounds: int, synchronize: Callable[[], None]) -> dict:
    """Run every candidate once a round and return the seconds of each run by name; one round more warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        for name, candidate in candidates.items():
            synchronize()
            start = time.perf_counter()
            candidate()
            synchronize()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bytes_saved(model: nn.Module, x: Tensor, autocast: Callable = nullcontext) -> int:
    """Return the bytes that a forward pass keeps for backward, each storage once, parameters and input aside."""
    aside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in aside:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that kept its own output would never be freed, nor would its graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        outputs = model(x)
        total = sum(saved.values())
    del outputs
    return total


def train_step(model: nn.Module, x: Tensor, autocast: Callable, gradients: dict) -> None:
    """Run forward and backward of one step; the gradients that it starts from are made once."""
    model.zero_grad(set_to_none=True)
    x.grad = None
    with autocast():
        outputs = model(x)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
    for out in outputs:  # none of frozen stages
        gradients.setdefault((out.shape, out.dtype), torch.randn_like(out))
    torch.autograd.backward(outputs, [gradients[out.shape, out.dtype] for out in outputs])


@torch.no_grad()
def inference(model: nn.Module, x: Tensor, autocast: Callable) -> None:
    """Run forward alone."""
    with autocast():
        model(x)


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


def time_models(title: str, models: dict[str, nn.Module], x: Tensor, args: argparse.Namespace) -> None:
    """Time models and print their table."""
    on_gpu = x.device.type == 'cuda'
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    gradients: dict = {}
    models = {name: model.to(args.device, memory_format=args.memory_format) for name, model in models.items()}
    trained, memory = {}, {}
    for name, model in models.items():
        model.train()
        trained[name] = lambda model=model: train_step(model, x, args.autocast, gradients)
        memory[name] = bytes_saved(model, x, args.autocast) / 1e6
    steps = ratios(interleaved(trained, args.rounds, synchronize))
    peaks = {}
    for name, step in trained.items() if on_gpu else ():
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[name] = torch.cuda.max_memory_allocated() / 1e6
    tested = {}
    for name, model in models.items():
        model.eval()  # mmdet's returns nothing
        tested[name] = lambda model=model: inference(model, x, args.autocast)
    forward = ratios(interleaved(tested, args.rounds, synchronize))
    columns = ['train step, ms', 'ratio (quartiles)', 'inference, ms', 'ratio (quartiles)', 'saved for backward, MB']
    columns += ['ratio', *(['peak MB'] if on_gpu else [])]
    print(f'\n{title}\n\n| | {" | ".join(columns)} |\n|{" --- |" * (len(columns) + 1)}')
    first = next(iter(memory.values()))
    for name in models:
        cells = [*steps[name], *forward[name], f'{memory[name]:.1f}', f'{memory[name] / first:.3f}']
        print(f'| {name} | {" | ".join([*cells, *([f"{peaks[name]:.0f}"] if on_gpu else [])])} |', flush=True)


def compare_blocks(args: argparse.Namespace) -> None:
    """Compare the block with the released form and with BatchNorm."""
    for *shape, d in args.shapes:
        x = torch.randn(shape, device=args.device).to(memory_format=args.memory_format).requires_grad_()
        ce = ChannelEquilibrium(shape[1], num_channels=d)
        released = ReleasedForm(copy.deepcopy(ce))
        models = {'CE, released form': released, 'CE': ce, 'BatchNorm2d': nn.BatchNorm2d(shape[1])}
        time_models(f'block {"x".join(map(str, shape))}, d = {d}', models, x, args)


def compare_backbones(args: argparse.Namespace, mode: str) -> None:
    """Compare the backbone with mmdet's plain ResNet, the released form of CE, and other blocks."""
    size, options = (args.batch, 3, *args.size), MODES[mode]
    x = torch.randn(size, device=args.device).to(memory_format=args.memory_format)
    models = {'plain ResNet': ResNet(args.depth, **options), 'CE': CEResNet(args.depth, **options)}
    models['CE'].load_state_dict(models['plain ResNet'].state_dict(), strict=False)
    with torch.no_grad():  # CE needs statistics before it is evaluated
        for _, layer in models['CE'].to(args.device).named_ce():
            layer.train()
        models['CE'](x)
    if mode == 'norm_eval':
        models['CE, ce_eval=False'] = CEResNet(args.depth, ce_eval=False, **options)
        models['CE, ce_eval=False'].load_state_dict(models['CE'].state_dict())
    models.update({f'{name}, released form': with_released_form(model) for name, model in [*models.items()][1:]})
    if args.rivals:
        models['plain + ContextBlock'] = RivalResNet(args.depth, 'gc', **options)
        models['plain + SE'] = RivalResNet(args.depth, 'se', **options)
    time_models(f'ResNet-{args.depth}, {"x".join(map(str, size))}, {mode}', models, x, args)


def block_shape(text: str) -> list[int]:
    """Read N, C, H, W and d from ``NxCxHxWdD``."""
    match = re.fullmatch(r'(\d+)x(\d+)x(\d+)x(\d+)d(\d+)', text)
    if match is None:
        raise argparse.ArgumentTypeError(f'expected NxCxHxWdD, as 2x256x80x80d16, got {text!r}')
    return [int(number) for number in match.groups()]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--what', nargs='+', choices=['block', 'backbone'], default=['block', 'backbone'])
    parser.add_argument(
        '--shapes', nargs='+', type=block_shape, default=[block_shape(text) for text in BLOCK_SHAPES],
        help=f'block inputs as NxCxHxWdD (default: {" ".join(BLOCK_SHAPES)})',
    )  # fmt: skip
    parser.add_argument('--depth', type=int, default=50, help='(default: %(default)s)')
    parser.add_argument('--batch', type=int, default=2, help='images in the backbone input (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs=2, default=[320, 480], help='height, width (default: 320 480)')
    modes = 'of the backbone: norm_eval (default); coco, which freezes a stage too; batch, statistics of the batch'
    parser.add_argument('--modes', nargs='+', choices=[*MODES], default=['norm_eval'], help=modes)
    parser.add_argument('--rivals', action='store_true', help='with ContextBlock and SE in the plain backbone, too')
    dtypes = 'autocast dtype; tf32 is float32 with TF32 products on CUDA (default: %(default)s)'
    parser.add_argument('--dtype', choices=['float32', 'tf32', 'bfloat16', 'float16'], default='float32', help=dtypes)
    parser.add_argument('--channels-last', action='store_true')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', type=torch.device, default=device, help='(default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=15, help='timed rounds, 2 or more (default: %(default)s)')
    return parser.parse_args()


def main() -> None:
    """Command line."""
    args = parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.dtype == 'tf32'
    dtype = torch.float32 if args.dtype == 'tf32' else getattr(torch, args.dtype)
    args.autocast = nullcontext if dtype == torch.float32 else lambda: torch.autocast(args.device.type, dtype=dtype)
    args.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    gpu = args.device.type == 'cuda'
    machine = torch.cuda.get_device_name(args.device) if gpu else f'{processor()}, {torch.get_num_threads()} threads'
    layout = ', channels_last' if args.channels_last else ''
    form = os.environ.get('MMDET_CE_KERNELS', 'auto')
    print(f'{machine}; torch {torch.__version__}, mmdet_ce {__version__}, kernels {form}; {args.dtype}{layout}')
    if 'block' in args.what:
        compare_blocks(args)
    for mode in args.modes if 'backbone' in args.what else []:
        compare_backbones(args, mode)


if __name__ == '__main__':
    main()
