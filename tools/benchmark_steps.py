"""What tools/benchmark_ce.py does with its candidates: run them in turn, count what a step takes, print rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

HEADER = """\
| what | candidate | ms | over plain (quartiles) | host, ms | peak, MiB \
| kept for backward, MB | over plain | operations, forward + backward |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
failures: list[str] = []  # the measurements that failed


class Operations(TorchDispatchMode):
    """Counts the operations that torch starts. Views and new empty tensors start nothing on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Count an operation and run it."""
        starts_nothing = function.is_view or 'empty' in function.name() or 'unsafe_view' in function.name()
        self.count += not starts_nothing
        return function(*args, **(kwargs or {}))


def attempt(what: str, function: Callable, *args: Any) -> Any:
    """Return what a measurement gives; one that fails is a row, the answer None, and the next one runs all the same."""
    try:
        return function(*args)
    except Exception as error:
        failures.append(what)
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        print(f'| {what} | failed: {reason[:300]} |', flush=True)


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Step:
    """A step of a model: forward and, outside inference, backward from gradients that are made once."""

    def __init__(self, model: nn.Module, inputs: list[Tensor], inference: bool, dtype: str) -> None:
        self.model = model
        self.inputs = inputs
        self.inference = inference
        self.amp = nullcontext()
        if dtype != 'float32':
            # Without the cache, which a CUDA graph cannot have: a step uses each weight once.
            self.amp = torch.autocast(inputs[0].device.type, getattr(torch, dtype), cache_enabled=False)
        self.gradients: list[Tensor] = []

    def forward(self) -> tuple[Tensor, ...]:
        """Return the outputs of the model."""
        with self.amp, torch.set_grad_enabled(not self.inference):
            return self.model(*self.inputs)

    def backward(self, outs: tuple[Tensor, ...]) -> None:
        """Run the backward pass."""
        outs = [out for out in outs if out.requires_grad]  # not those of frozen stages
        if not self.gradients:
            self.gradients = [torch.randn_like(out) for out in outs]
        if outs:
            torch.autograd.backward(outs, self.gradients)
        for tensor in (*self.model.parameters(), *self.inputs):
            tensor.grad = None

    def __call__(self) -> None:
        """Run the step."""
        self.backward(self.forward())

    def bytes_kept(self) -> int:
        """Return the bytes that the forward pass keeps for the backward pass, each storage once, parameters aside."""
        aside = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in aside:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # a node that kept its own output would never be freed, nor would its graph

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outs = self.forward()  # kept until all is counted, or a storage's address could come twice
        del outs
        return sum(kept.values())

    def operations(self) -> str:
        """Return how many operations the forward and the backward pass start."""
        with Operations() as forward:
            outs = self.forward()
        with Operations() as backward:
            self.backward(outs)
        return f'{forward.count} + {backward.count}'

    def captured(self) -> Callable[[], None]:
        """Return the replay of a CUDA graph of the forward pass."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outs = self.forward()
        return graph.replay


def prepared(kind: str, step: Step) -> Callable[[], None]:
    """Return a step as it is ('eager'), 'compiled', or as a 'CUDA graph', run once."""
    run: Callable[[], None] = step
    if kind == 'compiled':
        run = copy(step)
        run.model = torch.compile(step.model)
    if kind == 'CUDA graph':
        run = step.captured()
    run()
    return run


def peak(run: Callable[[], None]) -> str:
    """Return the MiB that a step takes at most beside what is there before it, on a GPU."""
    if not torch.cuda.is_initialized():
        return '-'
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return f'{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}'


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Run all once a round; return by name the seconds in all and those of the host. One round more warms up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            host = time.perf_counter() - start
            synchronize()
            total = time.perf_counter() - start
            if index:
                seconds[name].append((total, host))
    return seconds


def compare(title: str, steps: dict[str, Step], rounds: int, kinds: list[str]) -> None:
    """Time the kinds of the steps in turn and print a row for each; ratios are to the first."""
    runs: dict[str, Callable[[], None]] = {}
    for (name, step), kind in product(steps.items(), kinds):
        label = name if kind == 'eager' else f'{name}, {kind}'
        run = attempt(f'{title}, {label}', prepared, kind, step)
        if run is not None:
            runs[label] = run
    seconds = interleaved(runs, rounds)
    first = next(iter(runs))
    plain_bytes = max(1, next(iter(steps.values())).bytes_kept())
    for name, run in runs.items():
        total, host = (1e3 * statistics.median(column) for column in zip(*seconds[name]))
        low, middle, high = statistics.quantiles([a[0] / b[0] for a, b in zip(seconds[name], seconds[first])], n=4)
        row = f'| {title} | {name} | {total:.2f} | {middle:.3f} ({low:.2f}-{high:.2f}) | {host:.2f} | {peak(run)} |'
        if name in steps:
            kept = steps[name].bytes_kept()
            row += f' {kept / 1e6:.1f} | {kept / plain_bytes:.3f} | {steps[name].operations()} |'
        print(row, flush=True)


def profile(step: Step) -> str:
    """Return torch's table of the kernels of a step that take longest."""
    step()
    with torch.profiler.profile() as result:
        step()
        synchronize()
    device = step.inputs[0].device.type
    return result.key_averages().table(sort_by=f'self_{device}_time_total', row_limit=20, max_name_column_width=60)
