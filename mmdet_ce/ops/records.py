"""What the stages of the operator take, keep and return. Records are filled and read by name."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Parameters(NamedTuple):
    """The tensors that a gradient may be asked of, beside the maps; None where there is none."""

    theta: Tensor  # (1,)
    alpha: Optional[Tensor]  # (1,)
    conv_weight: Optional[Tensor]  # (C, C_in, 1, 1), of the convolution before the norm
    norm_weight: Optional[Tensor]  # (C,)
    norm_bias: Optional[Tensor]  # (C,)
    fc1_weight: Tensor  # (C / r, C)
    ln_weight: Tensor  # (C / r,)
    ln_bias: Tensor  # (C / r,)
    fc2_weight: Tensor  # (C, C / r)


class Settings(NamedTuple):
    """Arguments that no gradient is asked of."""

    group_size: int
    num_iterations: int
    eps: float
    running_whitening: Optional[Tensor]  # (G, d, d), P_T in evaluation; None in training
    running_scale: Optional[Tensor]  # (1,), s in evaluation; None in training
    norm: Optional[nn.BatchNorm2d]  # its weight and bias are among the parameters
    norm_trains: bool  # whether the norm uses the statistics of the batch; its mode may change before the backward pass
    process_group: Optional[dist.ProcessGroup]  # whose samples are the batch in training; None for this process alone
    dtype: torch.dtype  # of all that is computed, but for the passes over 16-bit maps on CUDA

    @property
    def trains(self) -> bool:
        """Whether CE uses the statistics of the batch."""
        return self.running_whitening is None


class Moments(NamedTuple):
    """Means and covariances of the map h, by sample and block of J channels; B = 1 block through a convolution."""

    means: Tensor  # m, (N, B, J)
    covariances: Tensor  # S / (L - 1), (N, B, J, J); its diagonal alone, (N, B, J), where no more is needed


class BatchMoments(NamedTuple):
    """Mean and covariance of the map h over samples and positions."""

    mean: Tensor  # (B, J)
    covariance: Tensor  # (B, J, J); its diagonal alone, (B, J), where no more is needed
    shifts: Tensor  # m - mean, (N, B, J)


class Statistics(NamedTuple):
    """The statistics of the batch that running values follow; None where the running values were used."""

    mean: Optional[Tensor] = None  # (G, d, 1), mu of x
    whitening: Optional[Tensor] = None  # (G, d, d), P_T
    scale: Optional[Tensor] = None  # (1,), s
    is_finite: Optional[Tensor] = None  # (1,), whether the batch is finite


class NormInput(NamedTuple):
    """Mean and biased variance of the norm's input z over samples and positions, or their gradients."""

    mean: Tensor  # (C,)
    variance: Tensor  # (C,)


class Projected(NamedTuple):
    """Variances or covariance of the norm's output x = V h + b, and what the backward pass needs of them."""

    variance: Tensor  # v, (N, C), or the covariance of the batch, (G, d, d)
    projected: Tensor  # V times the covariances of h


class ProjectedGradients(NamedTuple):
    """What comes back through moments of z or x; None where nothing does."""

    covariances: Tensor  # the gradient of the covariances of h, of each sample or of the batch
    matrix: Optional[Tensor] = None  # half the gradient of W or V
    mean: Optional[Tensor] = None  # the gradient of the mean of h, (B, J)


class Saved(NamedTuple):
    """What the backward pass needs of the small matrices; None where there is none."""

    means: Tensor  # m of h, (N, B, J)
    affine: Tensor  # [V | b], (G, d, J + 1), x = V h + b
    projected: Tensor  # V S / (L - 1), (N, C, J); where S is diagonal so is this, (N, G, d)
    # the norm x = a z + b
    norm_mean: Optional[Tensor]  # (C,), the mean that it subtracts
    rstd: Optional[Tensor]  # (C,), its reciprocal deviation
    a: Optional[Tensor]  # (C,)
    # the gate
    variance: Tensor  # v, (N, C)
    hidden: Tensor  # W1 v, (N, C / r)
    hidden_mean: Tensor  # (N, 1), LayerNorm's mean of it
    hidden_rstd: Tensor  # (N, 1), LayerNorm's reciprocal deviation of it
    rectified: Tensor  # relu(LayerNorm(W1 v)), (N, C / r)
    gate: Tensor  # (N, C)
    # M
    lambda_: Tensor  # (1,)
    whitening: Tensor  # P_T, (G, d, d)
    reweighting: Tensor  # gate / s, (N, C)
    decorrelation: Tensor  # P [V | b], (G, d, J + 1)
    ce_matrix: Optional[Tensor]  # M [V | b] of CE alone, (N, G, d, J + 1), where CE has the share alpha
    matrix: Tensor  # M [V | b], (N, G, d, J + 1)
    # the batch, where the norm or CE trains
    batch_mean: Optional[Tensor] = None  # of h, (B, J)
    batch_covariance: Optional[Tensor] = None  # of h, (B, J, J), or its diagonal, (B, J)
    batch_shifts: Optional[Tensor] = None  # m - the mean of the batch, (N, B, J)
    # the batch, where CE trains
    batch_projected: Optional[Tensor] = None  # V times the covariance of the batch, (G, d, J)
    mean_variance: Optional[Tensor] = None  # (1,), s^2
    has_variance: Optional[Tensor] = None  # (1,)
    trace: Optional[Tensor] = None  # (G, 1, 1), of Sigma
    normalized: Optional[Tensor] = None  # (G, d, d), Sigma_N
    sample_share: Optional[Tensor] = None  # (1,), this process's share of all samples; None for one process
    position_share: Optional[Tensor] = None  # (1,), likewise of the positions
    shift: Optional[Tensor] = None  # (G, d), this process's mean of x minus that of all


class Coefficients(NamedTuple):
    """What the map h is multiplied with, and the statistics of the batch."""

    matrix: Tensor  # [F | c], (N, G, d, J + 1), y = F h + c
    statistics: Statistics
    saved: Saved


class Gradients(NamedTuple):
    """What the backward pass adds to F^T dy in dh = F^T dy + K (h - m) + k, and the gradients of the parameters."""

    k_matrix: Tensor  # K, (N, B, J, J); where it is diagonal its diagonal, (N, B, J)
    k_vector: Optional[Tensor]  # k, (N, B, J); None where it is 0
    parameters: Parameters
