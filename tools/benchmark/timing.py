"""How tools/benchmark_ce.py measures: time by rounds, bytes saved for backward, and a GPU's memory and busy time."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Optional

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


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
        return tensor.detach()  # a node that kept its own output would never be freed, nor would its graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x)
        total = sum(saved.values())
    del outputs
    return total


@lru_cache(maxsize=None)
def output_gradient(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the gradient that a step starts from; made once, since a loss would cost every candidate the same."""
    return torch.randn(shape, device=device).to(dtype)


def _autocast(x: Tensor, dtype: torch.dtype) -> AbstractContextManager:
    # Switched off, too, torch 2.3 and older refuse a dtype that autocast does not have on the device
    return nullcontext() if dtype == torch.float32 else torch.autocast(x.device.type, dtype=dtype)


def train_step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Run forward and backward of one step."""
    model.zero_grad(set_to_none=True)
    x.grad = None
    with _autocast(x, dtype):
        outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [out for out in outputs if out.requires_grad]  # of frozen stages none does
    torch.autograd.backward(outputs, [output_gradient(out.shape, out.dtype, out.device) for out in outputs])


@torch.no_grad()
def inference(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Run forward alone."""
    with _autocast(x, dtype):
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
