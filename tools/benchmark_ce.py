"""Time Channel Equilibrium: the block against the released form and BatchNorm, the backbone against mmdet's ResNet.

All candidates of a comparison run in one process, one after the other in every round, so that what else the machine
does touches them alike. Prints tables, writes results.json and benchmark.png. On a GPU, peak memory is measured too.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from benchmark_models import OnnxRuntime, ReleasedForm, plain_and_ce, rivals, with_released_form
from benchmark_report import report
from rich.progress import track
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mmdet_ce import CEResNet, ChannelEquilibrium, __version__
from mmdet_ce.ops.kernels import VARIABLE

# how a backbone is trained; 'coco' is the default of mmdet's configs
MODES = {
    'norm_eval': dict(norm_eval=True),
    'coco': dict(norm_eval=True, frozen_stages=1),
    'batch': dict(norm_eval=False),
}
BLOCK_SHAPES = ['2x64x160x160d64', '2x256x80x80d16', '2x512x40x40d16', '2x1024x20x20d16']


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Run every candidate once a round and return the seconds of each run; one round more warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in track(range(rounds + 1), description='timing', transient=True):
        for name, candidate in candidates.items():
            _synchronize(device)
            start = time.perf_counter()
            candidate()
            _synchronize(device)
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for backward, each storage once, parameters and input aside."""
    aside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in aside:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that kept its own output would keep itself, and the graph, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x)
        total = sum(saved.values())
    del outputs
    return total


@functools.lru_cache(maxsize=None)
def output_gradient(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the gradient that a step starts from; made once, since a loss would cost every candidate the same."""
    return torch.randn(shape, device=device).to(dtype)


def train_step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Run forward and backward of one step."""
    model.zero_grad(set_to_none=True)
    x.grad = None
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [out for out in outputs if out.requires_grad]  # of frozen stages none does
    torch.autograd.backward(outputs, [output_gradient(out.shape, out.dtype, out.device) for out in outputs])


@torch.no_grad()
def inference(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Run forward alone."""
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        model(x)


def peak_memory(step: Callable[[], None], device: torch.device) -> Optional[int]:
    """Return the peak bytes allocated on the GPU while ``step`` runs, or None on a CPU."""
    if device.type != 'cuda':
        return None
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


def gpu_milliseconds(step: Callable[[], None], device: torch.device, steps: int = 3) -> Optional[float]:
    """Return how long the kernels of ``step`` keep the GPU busy, or None on a CPU.

    A host that starts kernels more slowly than the GPU runs them makes a step longer than this.
    """
    if device.type != 'cuda':
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as result:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    kernels = [event for event in result.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time for event in kernels) / 1e3 / steps


def measure(
    title: str, models: dict[str, nn.Module], x: Tensor, args: argparse.Namespace, training: bool
) -> list[dict[str, Any]]:
    """Time one comparison; return a row for each model."""
    for model in models.values():
        model.train(training)
    step = train_step if training else inference
    candidates = {name: (lambda model=model: step(model, x, args.dtype)) for name, model in models.items()}
    seconds = interleaved(candidates, args.rounds, x.device)
    rows = []
    first = next(iter(seconds.values()))
    for name, model in models.items():
        quartiles = statistics.quantiles(seconds[name], n=4)
        # By round, so that a machine that slows down for a while does not pass for a difference.
        ratios = statistics.quantiles([a / b for a, b in zip(seconds[name], first)], n=4)
        rows.append(
            dict(
                comparison=title,
                candidate=name,
                median_ms=1e3 * quartiles[1],
                quartiles_ms=[1e3 * quartiles[0], 1e3 * quartiles[2]],
                time_ratio=ratios[1],
                time_ratio_quartiles=[ratios[0], ratios[2]],
                bytes_saved=bytes_saved(model, x) if training else None,
                peak_bytes=peak_memory(candidates[name], x.device),
                gpu_ms=gpu_milliseconds(candidates[name], x.device),
            )
        )
    return rows


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
    cpuinfo = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith('model name')]
    return f'{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads'


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
    torch.manual_seed(0)
    rows = benchmark_blocks(args) if 'block' in args.what else []
    for mode in args.modes if 'backbone' in args.what else []:
        rows += benchmark_backbone(args, mode)
    rows += benchmark_onnxruntime(args) if 'onnxruntime' in args.what else []
    report(rows, args.out_dir, environment)


if __name__ == '__main__':
    main()
