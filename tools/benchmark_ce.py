"""Time Channel Equilibrium: the block against the released form and BatchNorm, the backbone against mmdet's ResNet.

All candidates of a comparison run in one process, one after the other in every round, so that what else the machine
does touches them alike. Prints tables, writes results.json and benchmark.png. On a GPU, peak memory is measured too.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import re
from pathlib import Path
from typing import Any

from command_line import flush_denormals

import torch
from benchmark.models import OnnxRuntime, ReleasedForm, plain_and_ce, with_released_form
from benchmark.report import report
from benchmark.rivals import rivals
from benchmark.timing import measure
from provenance import processor
from torch import nn

from mmdet_ce import CEResNet, ChannelEquilibrium, __version__
from mmdet_ce.ops.kernels import VARIABLE

# how a backbone is trained; 'coco' is the default of mmdet's configs
MODES = {
    'norm_eval': dict(norm_eval=True),
    'coco': dict(norm_eval=True, frozen_stages=1),
    'batch': dict(norm_eval=False),
}
BLOCK_SHAPES = ['2x64x160x160d64', '2x256x80x80d16', '2x512x40x40d16', '2x1024x20x20d16']


def benchmark_blocks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the block with the released form and with a training BatchNorm, forward and backward."""
    rows = []
    for *shape, d in args.shapes:
        x = torch.randn(shape, device=args.device).to(memory_format=args.memory_format).requires_grad_()
        ce = ChannelEquilibrium(shape[1], num_channels=d).to(args.device)
        models = {'released form': ReleasedForm(copy.deepcopy(ce)), 'this': ce, 'BatchNorm2d': nn.BatchNorm2d(shape[1])}
        models = {name: model.to(args.device) for name, model in models.items()}
        rows += measure(f'block {"x".join(map(str, shape))}d{d}, forward + backward', models, x, args, training=True)
    return rows


def block_shape(text: str) -> list[int]:
    """Read N, C, H, W and d from ``NxCxHxWdD``."""
    match = re.fullmatch(r'(\d+)x(\d+)x(\d+)x(\d+)d(\d+)', text)
    if match is None:
        raise argparse.ArgumentTypeError(f'expected NxCxHxWdD, as 2x256x80x80d16, got {text!r}')
    return [int(number) for number in match.groups()]


def benchmark_backbone(args: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    """Compare the backbone with mmdet's plain ResNet, other blocks in it, and the released form of CE."""
    size, options = (args.batch, 3, *args.size), MODES[mode]
    x = torch.randn(size, device=args.device).to(memory_format=args.memory_format)
    plain, ce = plain_and_ce(args.depth, x, **options)
    models = {'plain ResNet': plain, 'CE': ce}
    if mode == 'norm_eval':
        models['CE, ce_eval=False'] = CEResNet(depth=args.depth, ce_eval=False, **options)
        models['CE, ce_eval=False'].load_state_dict(ce.state_dict())
    models.update({f'{name}, released form': with_released_form(model) for name, model in [*models.items()][1:]})
    models.update(rivals(args.depth, **options) if args.rivals else {})
    models = {name: model.to(args.device, memory_format=args.memory_format) for name, model in models.items()}
    name = f'ResNet-{args.depth} {"x".join(map(str, size))}'
    rows = measure(f'{name}, {mode}, train step', models, x, args, training=True)
    if mode != 'norm_eval':  # the mode does not matter to inference
        return rows
    evaluated = {name: model for name, model in models.items() if 'ce_eval' not in name}
    return rows + measure(f'{name}, inference', evaluated, x, args, training=False)


def benchmark_onnxruntime(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the backbone with mmdet's plain ResNet in torch and, exported, in onnxruntime."""
    import export_onnx  # needs packages that nothing else here does

    size = (args.batch, 3, *args.size)
    x = torch.randn(size).to(memory_format=args.memory_format)
    plain, ce = plain_and_ce(args.depth, x, norm_eval=True)
    models = {'plain ResNet': plain, 'CE': ce}
    for name, model in [*models.items()]:
        model.eval()
        models[f'{name}, onnxruntime'] = OnnxRuntime(export_onnx.session(export_onnx.export(model)))
    title = f'ResNet-{args.depth} {"x".join(map(str, size))}, inference in torch and onnxruntime'
    return measure(title, models, x, args, training=False)


def hardware(device: torch.device) -> str:
    """Name the processor or GPU that the benchmark runs on."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{processor()}, {torch.get_num_threads()} threads'


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--what', nargs='+', choices=['block', 'backbone', 'onnxruntime'], default=['block', 'backbone'],
        help='(default: block backbone)',
    )  # fmt: skip
    parser.add_argument(
        '--shapes',
        nargs='+',
        type=block_shape,
        default=[block_shape(text) for text in BLOCK_SHAPES],
        help=f'block inputs as NxCxHxWdD (default: {" ".join(BLOCK_SHAPES)})',
    )
    parser.add_argument('--depth', type=int, default=50, help='(default: %(default)s)')
    parser.add_argument('--batch', type=int, default=2, help='images in the backbone input (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs=2, default=[320, 480], help='height, width (default: 320 480)')
    parser.add_argument(
        '--modes', nargs='+', choices=[*MODES], default=['norm_eval'], help='of the backbone (default: norm_eval)'
    )
    parser.add_argument('--rivals', action='store_true', help='with ContextBlock and SE in the plain backbone, too')
    parser.add_argument(
        '--dtype', choices=['float32', 'tf32', 'bfloat16', 'float16'], default='float32',
        help='autocast dtype; tf32 is float32 with TF32 products on CUDA (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)'
    )
    parser.add_argument('--rounds', type=int, default=15, help='timed rounds (default: %(default)s)')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/benchmark'), help='(default: %(default)s)')
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error('--rounds must be at least 2: medians and quartiles need it')
    args.device = torch.device(args.device)
    if 'onnxruntime' in args.what and (args.device.type, args.dtype) != ('cpu', 'float32'):
        parser.error('--what onnxruntime compares on the CPU in float32: add --device cpu --dtype float32')
    environment = dict(
        hardware=hardware(args.device),
        python=platform.python_version(),
        torch=torch.__version__,
        mmdet_ce=__version__,
        dtype=args.dtype,
        memory_format='channels_last' if args.channels_last else 'contiguous',
        kernels=os.environ.get(VARIABLE, 'auto'),
        rounds=args.rounds,
    )
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.dtype == 'tf32'
    args.dtype = torch.float32 if args.dtype == 'tf32' else getattr(torch, args.dtype)
    args.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    flush_denormals()
    torch.manual_seed(0)
    rows = benchmark_blocks(args) if 'block' in args.what else []
    for mode in args.modes if 'backbone' in args.what else []:
        rows += benchmark_backbone(args, mode)
    rows += benchmark_onnxruntime(args) if 'onnxruntime' in args.what else []
    report(rows, args.out_dir, environment)


if __name__ == '__main__':
    main()
