"""Measure on a GPU: backbones, single operations, the kernels of a layer. Each fact is a line of JSON, printed at once.

``tools/dev_scripts/gpu_run.py`` runs this and makes a report. On a CPU it runs too, without the Triton form.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import time
from contextlib import nullcontext
from itertools import product
from typing import Callable

import torch
from mmdet.models import ResNet
from torch import nn
from torch.utils.benchmark import Timer

from mmdet_ce import CEResNet, ChannelEquilibrium
from mmdet_ce.ops.dispatch import VARIABLE

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
FORMS = ('plain', 'torch', 'triton') if CUDA else ('plain', 'torch')
# Mode of training, dtype, images; the most valuable first. "coco" is the default of the COCO configs.
CASES = {
    'first': ('coco bfloat16 2', 'inference bfloat16 1'),
    'dtypes': ('coco float32 2', 'coco tf32 2', 'coco float16 2', 'inference float32 1'),
    'modes': ('train_ce bfloat16 2', 'batch_statistics bfloat16 2', 'coco bfloat16 2 channels_last', 'coco bfloat16 8'),
}
SHAPES = ((64, 64, 400, 672), (256, 16, 200, 336), (512, 16, 100, 168), (1024, 16, 50, 84))  # C, d, H, W at 800 x 1344


def say(fact: str, **values: object) -> None:
    """Print a fact."""
    print(json.dumps(dict(fact=fact, **values)), flush=True)


def attempt(fact: str, measure: Callable[..., dict], *arguments: object) -> None:
    """Print what a measurement gives, or the error that it ends with: the next one runs all the same."""
    try:
        say(fact, **measure(*arguments))
    except Exception as error:
        say(fact, case=str(arguments), error=f'{type(error).__name__}: {str(error)[:300]}')


def synchronize() -> None:
    """Wait for the GPU."""
    torch.cuda.synchronize() if CUDA else None


def backbone(form: str, mode: str) -> nn.Module:
    """Return a ResNet-50 in the state of a mode of training, plain or with CE."""
    kwargs = dict(depth=50, frozen_stages=-1 if mode == 'batch_statistics' else 1, norm_eval=mode != 'batch_statistics')
    if mode == 'train_ce' and form != 'plain':
        kwargs['ce_eval'] = False
    torch.manual_seed(0)
    model = (ResNet if form == 'plain' else CEResNet)(**kwargs).to(DEVICE)
    model.train(mode != 'inference')
    return model


def speed(case: str, size: list[int], rounds: int) -> dict:
    """Time the steps of plain, torch and Triton in turn, so that a GPU that slows down slows all of them."""
    mode, dtype, images, *channels_last = case.split()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == 'tf32'
    x = torch.randn(int(images), 3, *size, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    models, gradients = {form: backbone(form, mode) for form in FORMS}, []
    amp = torch.autocast(DEVICE, getattr(torch, dtype)) if dtype in ('bfloat16', 'float16') else nullcontext()

    def step(form: str) -> tuple[float, float]:
        """Run a step; return the milliseconds until the host is free, and until all is done."""
        os.environ[VARIABLE] = 'torch' if form == 'plain' else form
        synchronize()
        start = time.perf_counter()
        with amp, torch.set_grad_enabled(mode != 'inference'):
            outs = [out for out in models[form](x) if out.requires_grad]
        if outs:
            gradients[:] = gradients or [torch.randn_like(out) for out in outs]
            torch.autograd.backward(outs, gradients)
            models[form].zero_grad(set_to_none=True)
        host = time.perf_counter()
        synchronize()
        return 1e3 * (host - start), 1e3 * (time.perf_counter() - start)

    first, peak = {}, {}
    for form in FORMS:
        first[form] = round(step(form)[1] / 1e3, 1)  # with the compilation and the check of kernels
        step(form)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            step(form)
            peak[form] = torch.cuda.max_memory_allocated() >> 20
    times = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            times[form].append(step(form))
    host, total = ({form: round(statistics.median(t[i] for t in times[form]), 2) for form in FORMS} for i in range(2))
    return dict(case=case, ms=total, host_ms=host, peak_mib=peak, first_step_s=first)


def microseconds(function: Callable[[], object]) -> float | str:
    """Return the time of an operation, or the error where torch does not have it."""
    try:
        return round(1e6 * Timer('run()', globals=dict(run=function)).timeit(20).median, 1)
    except Exception as error:
        return f'{type(error).__name__}: {str(error)[:60]}'


def operations(dtype: torch.dtype, channels: int, d: int, height: int, width: int) -> dict:
    """Time what decides about the torch form, alone: Gram matrices, the product, its end; a copy as the yardstick."""
    x = torch.randn(2, channels, height, width, device=DEVICE, dtype=dtype)
    shortcut, z = torch.randn_like(x), x.view(-1, d, height * width)
    m, c = (torch.randn(len(z), d, size, device=DEVICE, dtype=dtype) for size in (d, 1))
    sums = dict(out_dtype=torch.float32) if dtype != torch.float32 else {}
    functions = dict(
        gram=lambda: torch.bmm(z, z.mT, **sums),
        gram_of_float=lambda: torch.bmm(z.float(), z.float().mT),
        apply=lambda: torch.bmm(m, z),
        apply_and_tail=lambda: torch.bmm(m, z).add_(c).view_as(x).add_(shortcut).relu_(),
        var_mean=lambda: torch.var_mean(z, 2),
        copy=x.clone,
    )
    times = {name: microseconds(function) for name, function in functions.items()}
    return dict(dtype=str(dtype)[6:], shape=list(x.shape), d=d, megabytes=round(x.nbytes / 1e6, 1), us=times)


def profile(form: str, training: bool, channels: int, d: int, height: int, width: int) -> dict:
    """List the kernels of one layer with a folded norm, a shortcut and a ReLU, forward and backward."""
    os.environ[VARIABLE] = form
    norm, ce = nn.BatchNorm2d(channels).eval().to(DEVICE), ChannelEquilibrium(channels, num_channels=d).to(DEVICE)
    ce.train(training)
    x, shortcut, grad = (torch.randn(2, channels, height, width, device=DEVICE).bfloat16() for _ in range(3))
    x, shortcut = x.requires_grad_(), shortcut.requires_grad_()
    for _ in range(3):
        ce(x, norm, shortcut, relu=True).backward(grad)
    with torch.profiler.profile() as result:
        ce(x, norm, shortcut, relu=True).backward(grad)
        synchronize()
    device = torch.autograd.DeviceType.CUDA
    kernels = [(e.name.split('(')[0][:40], round(e.device_time, 1)) for e in result.events() if e.device_type == device]
    mode = 'training' if training else 'evaluation'
    return dict(form=form, mode=mode, shape=list(x.shape), us=round(sum(t for _, t in kernels)), kernels=kernels)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=[*CASES, 'operations', 'profile'])
    parser.add_argument('--size', type=int, nargs=2, default=[800, 1344], help='of the images (default: 800 1344)')
    parser.add_argument('--rounds', type=int, default=12, help='steps of each backbone (default: 12)')
    args = parser.parse_args()
    logging.disable(logging.INFO)
    scale = 800 / args.size[0]
    shapes = [(channels, d, int(height / scale), int(width / scale)) for channels, d, height, width in SHAPES]
    for case in CASES.get(args.what, ()):
        attempt('speed', speed, case, args.size, args.rounds)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32) if args.what == 'operations' else ():
            attempt('operations', operations, dtype, *shape)
        for form, training in product(FORMS[1:], (False, True)) if args.what == 'profile' else ():
            attempt('profile', profile, form, training, *shape)


if __name__ == '__main__':
    main()
