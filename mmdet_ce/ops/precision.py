"""In which dtype things are computed, and under which of torch's modes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .. import compat

MAX_FLOAT32_ITERATIONS = 8


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which operations on ``x`` keep their dtype."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if compat.is_autocast_enabled(device) else nullcontext()


def is_exporting() -> bool:
    """Return whether torch.export is tracing, and not torch.compile.

    Some versions of torch.compiler.is_exporting are true for both, and torch 2.6 has none.
    """
    return compat.is_compiling() and not compat.is_dynamo_compiling()


def is_tracing() -> bool:
    """Return whether torch.jit.trace or torch.export records what is computed."""
    return torch.jit.is_tracing() or is_exporting()


def in_backward_pass() -> bool:
    """Return whether autograd runs a backward pass in this thread, as while a checkpointed block is recomputed."""
    return torch._C._current_graph_task_id() != -1


def needs_float64(num_iterations: int, training: bool) -> bool:
    """Return whether the iteration takes more steps than float32 is exact enough for.

    In a direction without variance P grows by half with every step, and the effect of a rounding error of Sigma with
    its square: float32 has lost all digits there after twenty steps, and P is not finite after thirty.
    """
    return training and num_iterations > MAX_FLOAT32_ITERATIONS


def map_dtype(x: Tensor, double: bool) -> torch.dtype:
    """Return the dtype that the passes over the map compute in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float64 if double else torch.float32)


def small_dtype(x: Tensor, double: bool) -> torch.dtype:
    """Return the dtype of the small matrices: float32 at least, and products of IEEE precision.

    Where the user lets CUDA multiply float32 in TF32, float64 is taken, which no switch reaches: TF32 in the iteration
    and the gate would cost 1e-3 (T = 3) to 3e-2 (T = 8) of the output.
    """
    return torch.promote_types(
        x.dtype, torch.float64 if double or (x.is_cuda and compat.is_tf32_allowed()) else torch.float32
    )


def rounding_variance(dtype: torch.dtype) -> float:
    """Return the variance, in units of the mean square, below which it is but the rounding of equal values."""
    return (8 * torch.finfo(dtype).eps) ** 2


def least_variance(dtype: torch.dtype) -> float:
    """Return the variance below which a map has none that can be computed with: 1e-31 in float32.

    Squares of smaller deviations lose digits, and the gradient of 1 / s, which grows as 1 / s**2, would overflow.
    """
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps
