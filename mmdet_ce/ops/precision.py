"""In which dtype things are computed, and under which of torch's modes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import compat

MAX_FLOAT32_ITERATIONS = 8


def is_tracing() -> bool:
    """Return whether torch.jit.trace or torch.export records what is computed; torch.compile does not count."""
    # Some versions of torch.compiler.is_exporting are true for torch.compile too, and torch 2.6 has none
    return torch.jit.is_tracing() or (compat.is_compiling() and not compat.is_dynamo_compiling())


def in_backward_pass() -> bool:
    """Return whether autograd runs a backward pass in this thread, as while a checkpointed block is recomputed."""
    return torch._C._current_graph_task_id() != -1


def dtype_of(x: Tensor, num_iterations: int) -> torch.dtype:
    """Return the dtype to compute in: float32 at least, and float64 where the iteration takes many steps.

    In a direction without variance P grows by half with every step, and the effect of a rounding error of Sigma with
    its square: float32 has lost all digits there after twenty steps, and P is not finite after thirty.
    """
    needs_float64 = x.dtype == torch.float64 or num_iterations > MAX_FLOAT32_ITERATIONS
    return torch.float64 if needs_float64 else torch.float32


def stays_16_bit(x: Tensor) -> bool:
    """Return whether the passes take a map as it is: a 16-bit one on CUDA, whose products are summed in float32."""
    return x.is_cuda and x.element_size() == 2


def convolves_faster(x: Tensor) -> bool:
    """Return whether a convolution of x takes TF32 where a product of matrices does not: CUDA's default in float32."""
    is_float32 = x.is_cuda and x.dtype == torch.float32
    return is_float32 and torch.backends.cudnn.allow_tf32 and not compat.is_tf32_allowed()


def multiplies_in_tf32(x: Tensor) -> bool:
    """Return whether a product of float32 tensors like ``x`` may be rounded to TF32, as the user can allow on CUDA."""
    return x.is_cuda and x.dtype == torch.float32 and compat.is_tf32_allowed()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of small matrices to float32's digits: TF32 would cost up to 3e-2 of the output (T = 8)."""
    if not multiplies_in_tf32(a):
        return torch.bmm(a, b) if a.dim() == b.dim() == 3 else a @ b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return a_high @ b_high + (a_high @ b_low + a_low @ b_high)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors that sum up to ``x``, the first of which TF32 holds exactly."""
    high = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, x - high


def add_matmul(added: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Return beta added + alpha a b, as ``matmul`` computes it."""
    if multiplies_in_tf32(a):
        return torch.add(beta * added, matmul(a, b), alpha=alpha)
    return torch.baddbmm(added, a, b, beta=beta, alpha=alpha)


def dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of the rows of (N, C, J) with those of (C, J), summed over J: (N, C)."""
    return torch.bmm(a.transpose(0, 1), b[..., None])[..., 0].T


def sum_rows(weights: Tensor, a: Tensor) -> Tensor:
    """Return the rows of (N, C, J) by their weights, (N, C), summed over N: (C, J).

    The strides of the weights are those that MKL multiplies in one batch; from others torch loops over channels.
    """
    return torch.bmm(weights.T[..., None].mT, a.transpose(0, 1))[:, 0]


def rounding_variance(dtype: torch.dtype) -> float:
    """Return the variance, in units of the mean square, below which it is but the rounding of equal values."""
    return (8 * torch.finfo(dtype).eps) ** 2


def least_variance(dtype: torch.dtype) -> float:
    """Return the variance below which a map has none that can be computed with: 1e-31 in float32.

    Squares of smaller deviations lose digits, and the gradient of 1 / s, which grows as 1 / s**2, would overflow.
    """
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps
