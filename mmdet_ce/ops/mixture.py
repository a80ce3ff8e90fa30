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
    reweighting: Tensor  # (N, G, d), gate / s
    ce_matrix: Tensor  # (N, G, d, d), M of CE alone
    matrix: Tensor  # (N, G, d, d), M; (1 - alpha) I + alpha (M of CE alone) where CE grows in


class MixtureGradients(NamedTuple):
    """The gradients of what M is mixed from."""

    theta: Tensor  # (1,)
    alpha: Optional[Tensor]  # (1,)
    log_gate: Tensor  # (N, C), with respect to log(gate)
    log_inverse_scale: Optional[Tensor]  # (1,), with respect to log(1 / s); None in evaluation
    whitening: Optional[Tensor]  # (G, d, d); None in evaluation


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
    reweighting = (gate / scale).unflatten(1, whitening.shape[:2])
    matrix = ce_matrix = torch.lerp(reweighting.diag_embed(), whitening, lambda_)
    if alpha is not None:
        matrix = torch.lerp(eye(ce_matrix), ce_matrix, alpha)
    return MixtureState(lambda_, whitening, reweighting, ce_matrix, matrix)


def mixture_backward(
    state: MixtureState, alpha: Optional[Tensor], d_matrix: Tensor, training: bool
) -> MixtureGradients:
    """Return the gradients of what M is mixed from.

    Args:
        state: Of the forward pass.
        alpha: That of the forward pass.
        d_matrix: dM, (N, G, d, d).
        training: Whether P and s are the batch's, and have gradients.
    """
    d_alpha = None
    if alpha is not None:
        d_alpha = (d_matrix * (state.ce_matrix - eye(d_matrix))).sum().view(1)
        d_matrix = alpha * d_matrix
    summed = d_matrix.sum(0)
    by_gate = d_matrix.diagonal(dim1=2, dim2=3) * state.reweighting
    towards_whitening = torch.dot(summed.flatten(), state.whitening.flatten())
    towards_reweighting = by_gate.sum().view(1)
    d_theta = torch.ops.aten.sigmoid_backward(towards_whitening - towards_reweighting, state.lambda_)
    return MixtureGradients(
        d_theta,
        d_alpha,
        _times_rest(by_gate, state.lambda_).flatten(1),
        _times_rest(towards_reweighting, state.lambda_) if training else None,
        state.lambda_ * summed if training else None,
    )


def _times_rest(tensor: Tensor, lambda_: Tensor) -> Tensor:
    """Return (1 - lambda) times a tensor."""
    return torch.addcmul(tensor, tensor, lambda_, value=-1)
