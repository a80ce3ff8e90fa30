"""Time Channel Equilibrium: the block against the released form and BatchNorm, the backbone against mmdet's ResNet.

All candidates of a comparison run in one process, one after the other in every round, so that what else the machine
does touches them alike. Prints tables, writes results.json and benchmark.png. On a GPU, peak memory is measured too.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models import ResNet
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from mmdet_ce import CEResNet, ChannelEquilibrium, __version__

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

BLOCK_SHAPES = ['2x64x160x160d64', '2x256x80x80d16', '2x512x40x40d16', '2x1024x20x20d16']


class ReleasedForm(nn.Module):
    """CE computed pass by pass, as the released code does: its order of passes, copies and saved tensors.

    The same parameters and statistics as ``ce``, and the same output; a yardstick, not a layer.
    """

    def __init__(self, ce: ChannelEquilibrium) -> None:
        super().__init__()
        self.ce = ce

    def forward(self, x: Tensor) -> Tensor:
        """Apply CE to ``x``, (N, C, H, W)."""
        ce, (n, c, h, w) = self.ce, x.shape
        variance = x.reshape(n, c, -1).var(dim=-1)
        gate = torch.sigmoid(ce.ir.fc2(F.relu(ce.ir.norm(ce.ir.fc1(variance)))))
        # Copied twice, for the statistics (a pooling, switched off, stands in between) and for the product.
        pooled = x.transpose(0, 1).contiguous().view(ce.num_groups, ce.group_size, -1)
        grouped = x.transpose(0, 1).contiguous().view(ce.num_groups, ce.group_size, -1)
        if ce.training:
            scale = variance.mean().sqrt()
            mean = pooled.mean(-1, keepdim=True)
            centered = pooled - mean
            eye = torch.eye(ce.group_size, dtype=x.dtype, device=x.device).expand(ce.num_groups, -1, -1)
            sigma = torch.baddbmm(eye, centered, centered.transpose(1, 2), beta=ce.bd.eps, alpha=1 / centered.shape[2])
            sigma_n = sigma / (sigma * eye).sum((1, 2), keepdim=True)
            whitening = eye
            for _ in range(ce.bd.num_iterations):
                whitening = torch.baddbmm(whitening, whitening @ whitening @ whitening, sigma_n, beta=1.5, alpha=-0.5)
            ce._update(mean, whitening, scale)
        else:
            grouped - ce.bd.running_mean  # computed, never used
            scale, whitening = ce.ir.running_scale, ce.bd.running_whitening
        reweighted = (gate / scale)[:, :, None, None].expand_as(x) * x
        decorrelated = (whitening @ grouped).reshape(c, n, h, w).transpose(0, 1).contiguous()
        lam = torch.sigmoid(ce.theta)
        return lam * decorrelated + (1 - lam) * reweighted


def with_released_form(backbone: CEResNet) -> CEResNet:
    """Return a copy of ``backbone`` whose CE layers compute as the released code does."""
    backbone = copy.deepcopy(backbone)
    for name, ce in list(backbone.named_ce()):
        backbone.set_submodule(name, ReleasedForm(ce))
    return backbone


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
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x)
        total = sum(saved.values())
    del outputs
    return total


@functools.cache
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


def plain_and_ce(depth: int, x: Tensor) -> tuple[ResNet, CEResNet]:
    """Return mmdet's ResNet and, of the same weights, CE's, whose statistics are those of ``x``."""
    plain = ResNet(depth=depth, norm_eval=True)
    ce = CEResNet(depth=depth, norm_eval=True)
    ce.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():  # CE needs statistics before it is evaluated
        ce.to(x.device).train()
        for _, layer in ce.named_ce():
            layer.train()
        ce(x)
    return plain, ce


def benchmark_backbone(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the backbone with mmdet's plain ResNet and with the released form of CE, norms in evaluation."""
    size = (args.batch, 3, *args.size)
    x = torch.randn(size, device=args.device).to(memory_format=args.memory_format)
    plain, ce = plain_and_ce(args.depth, x)
    batch_statistics = CEResNet(depth=args.depth, norm_eval=True, ce_eval=False)
    batch_statistics.load_state_dict(ce.state_dict())
    models = {
        'plain ResNet': plain,
        'CE': ce,
        'CE, ce_eval=False': batch_statistics,
        'CE, released form': with_released_form(ce),
        'CE, ce_eval=False, released form': with_released_form(batch_statistics),
    }
    models = {name: model.to(args.device, memory_format=args.memory_format) for name, model in models.items()}
    name = f'ResNet-{args.depth} {"x".join(map(str, size))}, norm_eval'
    rows = measure(f'{name}, train step', models, x, args, training=True)
    evaluated = {name: model for name, model in models.items() if 'ce_eval' not in name}
    return rows + measure(f'{name}, inference', evaluated, x, args, training=False)


class OnnxRuntime(nn.Module):
    """A session of onnxruntime, called as the backbone that it was made from."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, x: Tensor) -> tuple[np.ndarray, ...]:
        """Return the levels for images (N, 3, H, W)."""
        return tuple(self.session.run(None, {'images': x.numpy()}))


def benchmark_onnxruntime(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the backbone with mmdet's plain ResNet in torch and, exported, in onnxruntime."""
    import export_onnx  # needs packages that nothing else here does

    size = (args.batch, 3, *args.size)
    x = torch.randn(size).to(memory_format=args.memory_format)
    plain, ce = plain_and_ce(args.depth, x)
    models = {'plain ResNet': plain, 'CE': ce}
    for name, model in [*models.items()]:
        model.eval()
        models[f'{name}, onnxruntime'] = OnnxRuntime(export_onnx.session(export_onnx.export(model)))
    title = f'ResNet-{args.depth} {"x".join(map(str, size))}, inference in torch and onnxruntime'
    return measure(title, models, x, args, training=False)


def report(rows: list[dict[str, Any]], out_dir: Path, environment: dict[str, Any]) -> None:
    """Print the tables; write results.json and benchmark.png. The first row of a comparison is its yardstick."""
    comparisons: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        comparisons.setdefault(row['comparison'], []).append(row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(environment)
    for title, group in comparisons.items():
        table = Table(title=title)
        for column in ('', 'median ms', 'quartiles', 'ratio', 'quartiles', 'saved MB', 'ratio', 'peak ratio'):
            table.add_column(column, justify='left' if not column else 'right')
        first = group[0]
        for row in group:
            for key in ('bytes_saved', 'peak_bytes'):
                row[f'{key}_ratio'] = row[key] / first[key] if first[key] else None
            table.add_row(
                row['candidate'],
                f'{row["median_ms"]:.2f}',
                '{:.1f}-{:.1f}'.format(*row['quartiles_ms']),
                f'{row["time_ratio"]:.3f}',
                '{:.2f}-{:.2f}'.format(*row['time_ratio_quartiles']),
                f'{row["bytes_saved"] / 1e6:.1f}' if row['bytes_saved'] else '-',
                f'{row["bytes_saved_ratio"]:.3f}' if row['bytes_saved_ratio'] else '-',
                f'{row["peak_bytes_ratio"]:.3f}' if row['peak_bytes_ratio'] else '-',
            )
        console.print(table)
    blocks = [row['time_ratio'] for row in rows if row['candidate'] == 'this']
    summary = {}
    if blocks:
        summary['block_speedup_geometric_mean'] = 1 / statistics.geometric_mean(blocks)
        console.print(f'block: {summary["block_speedup_geometric_mean"]:.2f} times as fast as the released form')
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / 'results.json').write_text(json.dumps(dict(environment=environment, **summary, rows=rows), indent=1))
    draw(comparisons, out_dir / 'benchmark.png', environment)
    console.print(f'written: {out_dir / "results.json"}, {out_dir / "benchmark.png"}')


def draw(comparisons: dict[str, list[dict[str, Any]]], path: Path, environment: dict[str, Any]) -> None:
    """Draw the medians as bars, with their quartiles."""
    heights = [len(group) + 1 for group in comparisons.values()]
    figure, axes = plt.subplots(
        len(heights), figsize=(9, 0.42 * sum(heights) + 1), height_ratios=heights, layout='constrained', squeeze=False
    )
    for axis, (title, group) in zip(axes[:, 0], comparisons.items()):
        medians = [row['median_ms'] for row in group]
        spread = [[abs(row['quartiles_ms'][k] - row['median_ms']) for row in group] for k in (0, 1)]
        colours = [
            '0.65' if 'released' in row['candidate'] or index == 0 else 'tab:blue' for index, row in enumerate(group)
        ]
        bars = axis.barh([row['candidate'] for row in group], medians, xerr=spread, color=colours, ecolor='0.3')
        axis.bar_label(bars, [f'{row["median_ms"]:.1f} ms, {row["time_ratio"]:.2f}x' for row in group], padding=6)
        axis.set_title(title, loc='left', fontsize=10)
        axis.set_xlim(0, 1.3 * max(medians))
        axis.invert_yaxis()
        axis.spines[['top', 'right']].set_visible(False)
    axes[-1, 0].set_xlabel('milliseconds, median and quartiles')
    figure.suptitle(f'{environment["hardware"]}, torch {environment["torch"]}, {environment["dtype"]}', fontsize=10)
    figure.savefig(path, dpi=120)


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
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32', help='autocast dtype')
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
        rounds=args.rounds,
    )
    args.dtype = getattr(torch, args.dtype)
    args.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    rows = benchmark_blocks(args) if 'block' in args.what else []
    rows += benchmark_backbone(args) if 'backbone' in args.what else []
    rows += benchmark_onnxruntime(args) if 'onnxruntime' in args.what else []
    report(rows, args.out_dir, environment)


if __name__ == '__main__':
    main()
