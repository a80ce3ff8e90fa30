"""The gate of instance reweighting: sigmoid(W2 relu(LayerNorm(W1 v))) for each sample and channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import matmul
from .records import Parameters, Saved

LAYER_NORM_EPS = 1e-5


class Gate(NamedTuple):
    """The gate, and what its backward pass needs; the fields are those of ``Saved``."""

    hidden: Tensor  # (N, C / r)
    hidden_mean: Tensor  # (N, 1)
    hidden_rstd: Tensor  # (N, 1)
    rectified: Tensor  # (N, C / r)
    gate: Tensor  # (N, C)


def gate(variance: Tensor, p: Parameters) -> Gate:
    """Return the gate of the spatial variances v, (N, C)."""
    hidden = matmul(variance, p.fc1_weight.T)
    normed, mean, rstd = torch.native_layer_norm(hidden, p.ln_bias.shape, p.ln_weight, p.ln_bias, LAYER_NORM_EPS)
    rectified = F.relu(normed)
    return Gate(
        hidden=hidden,
        hidden_mean=mean,
        hidden_rstd=rstd,
        rectified=rectified,
        gate=torch.sigmoid(matmul(rectified, p.fc2_weight.T)),
    )


class GateGradients(NamedTuple):
    """The gradients of v and of the parameters of the gate."""

    variance: Tensor  # (N, C)
    fc1_weight: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    fc2_weight: Tensor


def gate_backward(d_log_gate: Tensor, saved: Saved, p: Parameters) -> GateGradients:
    """Return the gradients from that of log(gate), (N, C): the gate times its own gradient."""
    d_logits = torch.addcmul(d_log_gate, d_log_gate, saved.gate, value=-1)  # sigmoid' = gate (1 - gate)
    d_normed = torch.ops.aten.threshold_backward(matmul(d_logits, p.fc2_weight), saved.rectified, 0)
    d_hidden, d_ln_weight, d_ln_bias = torch.ops.aten.native_layer_norm_backward(
        d_normed,
        saved.hidden,
        p.ln_bias.shape,
        saved.hidden_mean,
        saved.hidden_rstd,
        p.ln_weight,
        p.ln_bias,
        [True] * 3,
    )
    return GateGradients(
        variance=matmul(d_hidden, p.fc1_weight),
        fc1_weight=matmul(d_hidden.T, saved.variance),
        ln_weight=d_ln_weight,
        ln_bias=d_ln_bias,
        fc2_weight=matmul(d_logits.T, saved.rectified),
    )
