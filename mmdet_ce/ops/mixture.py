"""M = lambda P + (1 - lambda) diag(gate / s): both branches of CE as one matrix for each sample and group."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .newton import eye


class MixtureState(NamedTuple):
    """M, and what the backward pass needs of the forward pass."""

    lambda_: Tensor  # (1,)
    whitening: Tensor  # (G, d, d), P_T
    reweighting: Tensor  # (N, G, d), (1 - lambda) gate / s
    equalizer: Tensor  # (N, G, d, d), M of CE alone
    matrix: Tensor  # (N, G, d, d), M; (1 - alpha) I + alpha (M of CE alone) where CE grows in


class MixtureGradients(NamedTuple):
    """The gradients of what M is mixed from."""

    whitening: Tensor  # (G, d, d)
    log_gate: Tensor  # (N, C), with respect to log(gate)
    log_inverse_scale: Tensor  # (1,), with respect to log(1 / s)
    theta: Tensor  # (1,)
    alpha: Optional[Tensor]  # (1,)


def mixture(whitening: Tensor, gate: Tensor, scale: Tensor, theta: Tensor, alpha: Optional[Tensor]) -> MixtureState:
    """Return M.

    Args:
        whitening: P_T, (G, d, d).
        gate: (N, C).
        scale: s, (1,).
        theta: (1,), lambda is its sigmoid.
        alpha: (1,), the share of CE in the output; None for CE alone.
    """
    lambda_ = torch.sigmoid(theta)
    reweighting = ((1 - lambda_) / scale * gate).unflatten(1, whitening.shape[:2])
    matrix = equalizer = lambda_ * whitening + reweighting.diag_embed()
    if alpha is not None:
        matrix = torch.lerp(eye(equalizer), equalizer, alpha)
    return MixtureState(lambda_, whitening, reweighting, equalizer, matrix)


def mixture_backward(state: MixtureState, alpha: Optional[Tensor], d_matrix: Tensor) -> MixtureGradients:
    """Return the gradients of what M is mixed from; ``d_matrix`` is dM, (N, G, d, d)."""
    d_alpha = None
    if alpha is not None:
        d_alpha = (d_matrix * (state.equalizer - eye(d_matrix))).sum().view(1)
        d_matrix = alpha * d_matrix
    d_whitening = state.lambda_ * d_matrix.sum(0)
    d_log_gate = d_matrix.diagonal(dim1=2, dim2=3) * state.reweighting
    d_log_inverse_scale = d_log_gate.sum().view(1)
    # lambda' = lambda (1 - lambda); 1 - lambda stands before the difference, which cancels near lambda = 1
    towards_whitening = torch.dot(d_whitening.flatten(), state.whitening.flatten())
    d_theta = (1 - state.lambda_) * towards_whitening - state.lambda_ * d_log_inverse_scale
    return MixtureGradients(d_whitening, d_log_gate.flatten(1), d_log_inverse_scale, d_theta, d_alpha)
