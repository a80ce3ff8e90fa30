"""Time Channel Equilibrium against mmdet's plain ResNet, on a CPU or a GPU. The report is Markdown.

    python tools/benchmark_ce.py --size 800 1344 --keep-heap
    python tools/benchmark_ce.py --what block --mode nothing-frozen inference
    python tools/benchmark_ce.py --what host --threads 1 --rounds 200
    python tools/benchmark_ce.py --device cuda --what backbone profile --dtype bfloat16 --mode coco inference --compiled

All candidates run in one process, in turn. A ratio is the median of the rounds' ratios to the plain network, with
their quartiles. So a machine that slows down for a while does not pass for a difference. A measurement that fails is
named in the report, and the others go on.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import sys
from itertools import product

import command_line  # noqa: F401  (sets variables of OpenMP's)

import benchmark_steps
import torch
from benchmark_steps import HEADER, Step, attempt, compare
from compare import processor
from mmdet.models import ResNet
from torch import Tensor, nn

from mmdet_ce import CEResNet, ChannelEquilibrium
from mmdet_ce.environment import describe_versions
from mmdet_ce.layers.block_end import block_end

NETWORKS = {'ResNet-50': dict(depth=50), 'demo': dict(depth=18, base_channels=32)}
MODES = {
    'coco': dict(frozen_stages=1, norm_eval=True),
    'nothing-frozen': dict(frozen_stages=-1, norm_eval=True),
    'ce-training': dict(frozen_stages=-1, norm_eval=True),
    'norms-training': dict(frozen_stages=-1, norm_eval=False),
    'inference': dict(),
}


class BlockEnd(nn.Module):
    """The end of a residual block after a 1x1 convolution: relu(norm(conv(h)) + shortcut), with CE or without."""

    def __init__(self, width: int, with_ce: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm = nn.BatchNorm2d(4 * width)
        self.ce = ChannelEquilibrium(4 * width, num_channels=16) if with_ce else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, h: Tensor, shortcut: Tensor) -> tuple[Tensor]:
        """Return the block's output for h, (N, width, H, W), and the shortcut, (N, 4 width, H, W)."""
        return (block_end(h, self.norm, self.ce, conv=self.conv, shortcut=shortcut, relu=self.relu),)


def prepare(
    plain: nn.Module, ce: nn.Module, inputs: list[Tensor], mode: str, dtype: str, args: argparse.Namespace
) -> dict[str, Step]:
    """Return a step of each model, with the same weights and inputs, on the device; give CE statistics."""
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    inputs = [tensor.to(device=args.device, memory_format=memory_format) for tensor in inputs]
    ce.load_state_dict(plain.state_dict(), strict=False)
    for model in (plain, ce):
        model.to(device=args.device, memory_format=memory_format)
        model.eval()  # mmdet's returns nothing
    for module in ce.modules():
        module.train(isinstance(module, ChannelEquilibrium))
    with torch.no_grad():
        ce(*inputs)
    return {name: Step(model, inputs, mode == 'inference', dtype) for name, model in (('plain', plain), ('CE', ce))}


def backbones(mode: str, dtype: str, args: argparse.Namespace) -> dict[str, Step]:
    """Return a step of the plain backbone and one of CE's in a mode."""
    kwargs = {**NETWORKS[args.network], **MODES[mode]}
    ce = CEResNet(ce_eval=False if mode == 'ce-training' else None, **kwargs)
    steps = prepare(ResNet(**kwargs), ce, [torch.randn(args.batch, 3, *args.size)], mode, dtype, args)
    for step in steps.values():
        step.model.train(mode != 'inference')
    return steps


def block_ends(mode: str, dtype: str, width: int, size: list[int], args: argparse.Namespace) -> dict[str, Step]:
    """Return a step of the end of a block without CE and one with it in a mode, on maps (H, W)."""
    inputs = [torch.randn(args.batch, channels, *size) for channels in (width, 4 * width)]
    steps = prepare(BlockEnd(width, False), BlockEnd(width, True), inputs, mode, dtype, args)
    for step in steps.values():
        step.model.norm.train(mode == 'norms-training')
        for tensor in step.inputs:
            tensor.requires_grad_(mode != 'inference')
    steps['CE'].model.ce.train(mode in ('ce-training', 'norms-training'))
    return steps


def measure(what: str, mode: str, dtype: str, args: argparse.Namespace) -> None:
    """Print the rows of one measurement in one mode."""
    title = f'{what}, {mode}, {dtype}'
    kinds = ['eager']
    if what == 'backbone':
        if args.compiled:
            kinds.append('compiled')
        if args.compiled and args.device == 'cuda' and mode == 'inference':
            kinds.append('CUDA graph')
        compare(f'{args.network} {title}', backbones(mode, dtype, args), args.rounds, kinds)
    elif what == 'profile':
        table = benchmark_steps.profile(backbones(mode, dtype, args)['CE'])
        print(f'\n{title}\n\n```\n{table}\n```\n\n{HEADER}')
    else:
        stages = [(width, [-(-side * 16 // width) for side in args.size]) for width in (64, 128, 256)]
        tiny = [(8, [4, 4]), (8, [16, 16])]  # the second is long enough for its width to go through the convolution
        for width, size in stages if what == 'block' else tiny:
            where = f'{title}, {width} to {4 * width}, {size[0]}x{size[1]}'
            compare(where, block_ends(mode, dtype, width, size, args), args.rounds, kinds)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--what', nargs='+', choices=['backbone', 'block', 'host', 'profile'], default=['backbone'],
        help='the network, the end of one block in stages 1 to 3, its host time on tiny maps, the kernels of a step',
    )  # fmt: skip
    parser.add_argument('--network', choices=[*NETWORKS], default='ResNet-50', help='demo: ResNet-18 of half width')
    parser.add_argument('--mode', nargs='+', choices=[*MODES], default=[*MODES], help='(default: all)')
    parser.add_argument('--size', type=int, nargs=2, default=[320, 480], help='height, width (default: 320 480)')
    parser.add_argument('--batch', type=int, default=2, help='images (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=9, help='timed rounds, 2 or more (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='(default: %(default)s)')
    parser.add_argument('--keep-heap', action='store_true', help='glibc keeps freed memory, as a GPU allocator does')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compiled', action='store_true', help='also by torch.compile, and on a GPU as a CUDA graph')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='(default: %(default)s)')
    parser.add_argument(
        '--dtype', nargs='+', choices=['float32', 'float16', 'bfloat16'], default=['float32'],
        help='16 bit is by autocast (default: float32)',
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    """Command line."""
    args = parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit(f'error: torch {torch.__version__} sees no CUDA device; nothing was measured')
    if args.keep_heap:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no memory by mmap, which each free would give back
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nor is the end of the heap given back
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{processor()}, {args.threads} threads'
    print(f'{device}; {describe_versions()}; `{" ".join(sys.argv[1:])}`\n\n{HEADER}')
    for what, dtype, mode in product(args.what, args.dtype, args.mode):
        attempt(f'{what}, {mode}, {dtype}', measure, what, mode, dtype, args)
        gc.collect()
    if benchmark_steps.failures:
        sys.exit(f'error: {len(benchmark_steps.failures)} measurements failed; each is named above')


if __name__ == '__main__':
    main()
