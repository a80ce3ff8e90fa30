"""The gate of instance reweighting: sigmoid(W2 relu(LayerNorm(W1 v))) for each sample and channel."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import matmul
from .records import Inputs, Saved

LAYER_NORM_EPS = 1e-5
# LayerNorm does not depend on the size of its input, but squaring large values overflows. So a sample whose largest
# variance is above this is divided down to it. The eps of LayerNorm is negligible beside it.
LARGE_VARIANCE = 2.0**40


def gate(variance: Tensor, inputs: Inputs) -> tuple[Optional[Tensor], ...]:
    """Return what ``Saved`` has of the gate, the gate itself last, for the spatial variances v, (N, C)."""
    if inputs.logits is not None:
        return *(None,) * 6, torch.sigmoid(inputs.logits)
    unit = (variance.amax(1, keepdim=True) / LARGE_VARIANCE).clamp(min=1.0)
    reduced = variance / unit
    hidden = matmul(reduced, inputs.fc1_weight.T)
    normed, mean, rstd = torch.native_layer_norm(
        hidden, inputs.ln_bias.shape, inputs.ln_weight, inputs.ln_bias, LAYER_NORM_EPS
    )
    rectified = F.relu(normed)
    return unit, reduced, hidden, mean, rstd, rectified, torch.sigmoid(matmul(rectified, inputs.fc2_weight.T))


def gate_backward(saved: Saved, inputs: Inputs, d_log_gate: Tensor) -> tuple[Tensor, tuple[Optional[Tensor], ...]]:
    """Return the gradients of v, (N, C), and of W1, LayerNorm's weight and bias, and W2; or of the logits after these.

    ``d_log_gate``, (N, C), is the gradient with respect to log(gate): the gate times its own gradient.
    """
    d_logits = torch.addcmul(d_log_gate, d_log_gate, saved.gate, value=-1)  # sigmoid' = gate (1 - gate)
    if inputs.logits is not None:
        return torch.zeros_like(d_logits), (None, None, None, None, d_logits)
    d_normed = torch.ops.aten.threshold_backward(matmul(d_logits, inputs.fc2_weight), saved.rectified, 0)
    d_hidden, d_ln_weight, d_ln_bias = torch.ops.aten.native_layer_norm_backward(
        d_normed,
        saved.hidden,
        inputs.ln_bias.shape,
        saved.hidden_mean,
        saved.hidden_rstd,
        inputs.ln_weight,
        inputs.ln_bias,
        [True] * 3,
    )
    d_variance = matmul(d_hidden / saved.unit, inputs.fc1_weight)
    return d_variance, (matmul(d_hidden.T, saved.reduced), d_ln_weight, d_ln_bias, matmul(d_logits.T, saved.rectified))
