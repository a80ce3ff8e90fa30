"""What the stages between the passes over a map take, keep and return."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors that M is computed from beside the map; None where there is none."""

    norm_running_mean: Optional[Tensor]  # (C,), of the folded norm
    norm_running_var: Optional[Tensor]  # (C,)
    norm_weight: Optional[Tensor]  # (C,)
    norm_bias: Optional[Tensor]  # (C,)
    alpha: Optional[Tensor]  # (1,)
    theta: Tensor  # (1,)
    fc1_weight: Optional[Tensor]  # (C / r, C)
    ln_weight: Optional[Tensor]  # (C / r,)
    ln_bias: Optional[Tensor]  # (C / r,)
    fc2_weight: Optional[Tensor]  # (C, C / r)
    logits: Optional[Tensor] = None  # (N, C), of the gate, where its modules computed them; then without the four above


class Options(NamedTuple):
    """Arguments that no gradient is asked of."""

    group_size: int
    num_iterations: int
    eps: float
    norm_eps: float
    running: Optional[tuple[Tensor, Tensor]]  # P_T and s in evaluation, None in training
    process_group: Optional[dist.ProcessGroup]  # whose samples are the batch in training; None for this process alone
    map_dtype: torch.dtype  # of the passes over the map
    dtype: torch.dtype  # of the small matrices


class Coefficients(NamedTuple):
    """M, and the statistics of the batch that it was computed with; None in evaluation."""

    matrix: Tensor  # (N, G, d, d), what z is multiplied with
    constant: Optional[Tensor]  # c, (N, G, d), what is added
    mean: Optional[Tensor]  # (G, d, 1), mu of x
    whitening: Optional[Tensor]  # (G, d, d), P_T
    scale: Optional[Tensor]  # (1,), s
    saved: tuple[Optional[Tensor], ...]  # for the backward pass: a Saved, or what the Triton form needs


class Saved(NamedTuple):
    """What the backward pass of the torch form needs of the forward pass; None where there is none."""

    sample_means: Optional[Tensor] = None  # m, (N, G, d), of z
    z_variance: Optional[Tensor] = None  # (N, G, d)
    # the folded norm x = a z + b
    rstd: Optional[Tensor] = None  # (G, d), its reciprocal deviation
    a: Optional[Tensor] = None  # (G, d)
    b: Optional[Tensor] = None  # (G, d)
    # the gate
    unit: Optional[Tensor] = None  # (N, 1), what the variances were divided by
    reduced: Optional[Tensor] = None  # (N, C), v / unit
    hidden: Optional[Tensor] = None  # (N, C / r), W1 v / unit
    hidden_mean: Optional[Tensor] = None  # (N, 1), LayerNorm's mean of it
    hidden_rstd: Optional[Tensor] = None  # (N, 1), LayerNorm's reciprocal deviation of it
    rectified: Optional[Tensor] = None  # (N, C / r), relu(LayerNorm(W1 v))
    gate: Optional[Tensor] = None  # (N, C)
    # M
    lambda_: Optional[Tensor] = None  # (1,)
    whitening: Optional[Tensor] = None  # (G, d, d), P_T
    reweighting: Optional[Tensor] = None  # (N, G, d), gate / s
    ce_matrix: Optional[Tensor] = None  # (N, G, d, d), M of CE alone
    matrix: Optional[Tensor] = None  # (N, G, d, d), M with alpha, before the norm is folded in
    # the batch, in training
    samples: Optional[Tensor] = None  # (1,), N of all processes; None if there is one
    positions: Optional[Tensor] = None  # (1,), N L of all processes; None if there is one
    z_mean: Optional[Tensor] = None  # (G, d)
    z_covariance: Optional[Tensor] = None  # (G, d, d)
    lacks_variance: Optional[Tensor] = None  # (1,), whether the variances are no more than rounding
    scale: Optional[Tensor] = None  # (1,), s
    trace: Optional[Tensor] = None  # (G, 1, 1), of Sigma
    normalized: Optional[Tensor] = None  # (G, d, d), Sigma_N
