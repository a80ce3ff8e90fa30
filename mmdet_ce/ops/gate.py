"""The gate of instance reweighting: sigmoid(W2 relu(LayerNorm(W1 v))) for each sample and channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5
# LayerNorm divides by the size of its input, but squares it first: variances above this one are divided by their
# largest before. Beside what is left eps is too small to count, so the gate stays the same.
LARGE_VARIANCE = 2.0**40


class GateParameters(NamedTuple):
    """The gate's parameters."""

    fc1_weight: Tensor  # (C / r, C), W1
    ln_weight: Tensor  # (C / r,)
    ln_bias: Tensor  # (C / r,)
    fc2_weight: Tensor  # (C, C / r), W2


class GateState(NamedTuple):
    """What the backward pass needs of the forward pass."""

    unit: Tensor  # (N, 1), what the variances were divided by
    reduced: Tensor  # (N, C), v / unit
    hidden: Tensor  # (N, C / r), W1 v / unit
    hidden_mean: Tensor  # (N, 1), LayerNorm's mean of it
    hidden_rstd: Tensor  # (N, 1), LayerNorm's reciprocal deviation of it
    rectified: Tensor  # (N, C / r), relu(LayerNorm(W1 v))
    gate: Tensor  # (N, C)


def gate(variance: Tensor, parameters: GateParameters) -> GateState:
    """Return the gate for the spatial variances v, (N, C), with what lies on the way."""
    w1, ln_weight, ln_bias, w2 = parameters
    unit = (variance.amax(1, keepdim=True) / LARGE_VARIANCE).clamp(min=1.0)
    reduced = variance / unit
    hidden = F.linear(reduced, w1)
    normed, mean, rstd = torch.native_layer_norm(hidden, ln_bias.shape, ln_weight, ln_bias, LAYER_NORM_EPS)
    rectified = F.relu(normed)
    return GateState(unit, reduced, hidden, mean, rstd, rectified, torch.sigmoid(F.linear(rectified, w2)))


def gate_backward(state: GateState, parameters: GateParameters, d_log_gate: Tensor) -> tuple[Tensor, GateParameters]:
    """Return the gradients of v, (N, C), and of the parameters.

    Args:
        state: Of the forward pass.
        parameters: Those of the forward pass.
        d_log_gate: (N, C), the gradient with respect to log(gate): the gate times its own gradient.
    """
    w1, ln_weight, ln_bias, w2 = parameters
    d_logits = torch.addcmul(d_log_gate, d_log_gate, state.gate, value=-1)  # sigmoid' = gate (1 - gate)
    d_normed = torch.ops.aten.threshold_backward(d_logits @ w2, state.rectified, 0)
    d_hidden, d_ln_weight, d_ln_bias = torch.ops.aten.native_layer_norm_backward(
        d_normed, state.hidden, ln_bias.shape, state.hidden_mean, state.hidden_rstd, ln_weight, ln_bias, [True] * 3
    )
    gradients = GateParameters(d_hidden.T @ state.reduced, d_ln_weight, d_ln_bias, d_logits.T @ state.rectified)
    return (d_hidden / state.unit) @ w1, gradients
