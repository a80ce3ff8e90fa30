"""Run what only a GPU can show, and write one Markdown report that can be pasted into an issue.

Parts: the tests of the kernels and of the GPU, the benchmark at 800x1333, a profile of one layer, and a short
training of Mask R-CNN with mixed precision on the generated data set. The parts do not depend on each other.

On a machine without a network, ``--wheels FOLDER`` installs what is missing from carried wheels, for this run alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from child_process import end_group, process_group

ROOT = Path(__file__).resolve().parents[2]
FORMS = ('triton', 'torch')


def run(title: str, command: list[str], minutes: float, environment: dict[str, str]) -> str:
    """Run one command of a part; return its section of the report, the end of its output in it."""
    print(f'gpu: {title}', flush=True)
    start = time.monotonic()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with process_group([sys.executable, *command], cwd=ROOT, env=environment, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=60 * minutes)
            verdict = 'passed' if process.returncode == 0 else f'failed (exit status {process.returncode})'
        except subprocess.TimeoutExpired:
            end_group(process)
            output, _ = process.communicate()
            verdict = f'stopped after {minutes} min'
    output = re.sub(r'\x1b\[[0-9;]*m', '', output)
    lines = [line for line in output.splitlines() if line.strip() and ' - INFO - ' not in line or 'loss' in line]
    print(f'gpu: {title}: {verdict}, {time.monotonic() - start:.0f} s', flush=True)
    shell = ' '.join(['python', *command])
    return f'## {title}: {verdict}\n\n`{shell}`\n\n```\n' + '\n'.join(lines[-60:]) + '\n```\n'


def suite(environment: dict[str, str], out_dir: Path) -> list[str]:
    """Test the kernels and the GPU, in both forms of the operator."""
    pytest = ['-m', 'pytest', '-q', '-p', 'no:warnings', '--show-capture=no']
    sections = [run('Kernels', [*pytest, '-n', '8', 'tests/test_kernels'], 4, environment)]
    for form in FORMS:
        form_environment = {**environment, 'MMDET_CE_KERNELS': form}
        sections.append(run(f'GPU suite, {form}', [*pytest, 'tests/test_gpu'], 3, form_environment))
    return sections


# dtype, form of the operator, images, modes of training
SPEED = (
    ('bfloat16', 'triton', 2, ('coco', 'norm_eval', 'batch')),
    ('bfloat16', 'triton', 8, ('coco', 'norm_eval')),
    ('bfloat16', 'torch', 2, ('coco',)),
    ('tf32', 'triton', 2, ('coco',)),
    ('tf32', 'triton', 8, ('coco',)),
    ('float32', 'triton', 2, ('coco',)),
)


def benchmark(environment: dict[str, str], out_dir: Path) -> list[str]:
    """Time the backbones at 800x1333, padded to a multiple of 32 as the detectors do."""
    sections = []
    for dtype, form, batch, modes in SPEED:
        command = ['tools/benchmark_ce.py', '--what', 'backbone', '--size', '800', '1344', '--batch', str(batch)]
        command += ['--dtype', dtype, '--modes', *modes, '--rounds', '7', '--rivals']
        command += ['--out-dir', str(out_dir / f'{dtype}-{form}-{batch}')]
        form_environment = {**environment, 'MMDET_CE_KERNELS': form}
        sections.append(run(f'Speed, {dtype}, {form}, {batch} images', command, 4, form_environment))
    return sections


PROFILE = """
import torch
from torch.profiler import ProfilerActivity, profile
from mmdet_ce import ChannelEquilibrium
for channels, size in ((256, (200, 336)), (512, (100, 168)), (1024, (50, 84))):
    norm, ce = torch.nn.BatchNorm2d(channels).eval().cuda(), ChannelEquilibrium(channels).cuda()
    x, shortcut, grad = (torch.randn(2, channels, *size, device='cuda').bfloat16() for _ in range(3))
    x.requires_grad_(), shortcut.requires_grad_()
    for mode in ('evaluation', 'training'):
        ce.train(mode == 'training')
        step = lambda: ce(x, norm, shortcut, relu=True).backward(grad)
        for _ in range(3):
            step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as result:
            step()
            torch.cuda.synchronize()
        kernels = [e for e in result.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        times = ', '.join(f'{e.name.split("(")[0][:28]} {e.device_time:.0f}' for e in kernels)
        total = sum(e.device_time for e in kernels)
        print(f'2x{channels}x{size[0]}x{size[1]} bf16, CE in {mode}: {len(kernels)} kernels, {total:.0f} us: {times}')
"""


def layer_profile(environment: dict[str, str], out_dir: Path) -> list[str]:
    """List the kernels of one layer, forward and backward."""
    script = out_dir / 'profile_layer.py'
    script.write_text(PROFILE)
    return [run(f'One layer, {form}', [str(script)], 2, {**environment, 'MMDET_CE_KERNELS': form}) for form in FORMS]


def training(environment: dict[str, str], out_dir: Path) -> list[str]:
    """Train Mask R-CNN with mixed precision on the generated data set for 300 iterations."""
    command = ['tools/train.py', 'configs/demo/mask-rcnn_r18-ce_fpn_8e_shapes.py', '--amp']
    command += ['--work-dir', str(out_dir / 'training'), '--cfg-options', 'model.backbone.depth=50']
    command += ['model.backbone.base_channels=64', 'model.neck.in_channels=[256,512,1024,2048]']
    command += ['train_cfg.max_epochs=3', 'default_hooks.logger.interval=50']
    environment = {**environment, 'MMDET_CE_KERNELS': 'triton'}
    return [run('Mask R-CNN R50-CE, AMP, triton', command, 5, environment)]


PARTS = dict(suite=suite, profile=layer_profile, benchmark=benchmark, training=training)


def install(wheels: Path, target: str) -> None:
    """Install carried wheels into a folder of this run's own."""
    files = [str(path) for path in sorted(wheels.glob('*.whl'))]
    if not files:
        sys.exit(f'gpu: error: no wheels in {wheels}')
    command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--upgrade', '--target', target]
    if subprocess.run([*command, *files]).returncode:
        sys.exit('gpu: error: the wheels could not be installed; the message of pip is above')


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--parts', nargs='+', choices=[*PARTS], default=[*PARTS], help='(default: all)')
    parser.add_argument('--wheels', type=Path, help='folder of wheels to install first, without a network')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/gpu'), help='(default: %(default)s)')
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit(f'gpu: no CUDA device is visible to torch {torch.__version__}; nothing was run')
    out_dir = args.out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_properties(0)
    versions = f'torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}'
    command = 'git rev-parse --short HEAD || true'
    commit = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    sections = [
        f'# mmdet_ce on a GPU\n\n{torch.cuda.device_count()} x {device.name}, compute capability {device.major}.'
        f'{device.minor}; {versions}; commit {commit.strip() or "unknown"}; {time.strftime("%Y-%m-%d")}\n'
    ]
    with tempfile.TemporaryDirectory() as site:
        paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
        if args.wheels is not None:
            install(args.wheels, site)
            paths.insert(1, site)
        environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'PYTHONUNBUFFERED': '1'}
        sections.append(run('Versions', ['-m', 'mmdet_ce', 'env'], 2, environment))
        if 'training' in args.parts and not (ROOT / 'data' / 'shapes').exists():
            subprocess.run([sys.executable, 'tools/make_shapes_dataset.py', 'data/shapes'], cwd=ROOT, env=environment)
        for part in args.parts:
            sections += PARTS[part](environment, out_dir)
            (out_dir / 'report.md').write_text('\n'.join(sections))
    print(f'gpu: written: {out_dir / "report.md"}')
    titles = [section.partition('\n')[0] for section in sections[1:]]
    failed = [title[3:] for title in titles if not title.endswith(': passed')]
    if failed:
        sys.exit(f'gpu: error: {"; ".join(failed)}')


if __name__ == '__main__':
    main()
