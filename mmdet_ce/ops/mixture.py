"""Both branches of CE as one matrix: M = lambda P + (1 - lambda) diag(gate / s), for each sample and group.

M itself is never made, only its product with [V | b], which is small: y = M x = M V h + M b.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .precision import dot_rows, matmul, sum_rows
from .records import Parameters, Saved


class Mixture(NamedTuple):
    """M [V | b], and what its backward pass needs; the fields are those of ``Saved``."""

    lambda_: Tensor  # (1,)
    reweighting: Tensor  # (N, C)
    decorrelation: Tensor  # (G, d, J + 1)
    ce_matrix: Optional[Tensor]  # (N, G, d, J + 1)
    matrix: Tensor  # (N, G, d, J + 1)


def mix(affine: Tensor, whitening: Tensor, gate: Tensor, scale: Tensor, p: Parameters) -> Mixture:
    """Return M [V | b] for [V | b], (G, d, J + 1), P, (G, d, d), the gate, (N, C), and s."""
    lambda_ = torch.sigmoid(p.theta)
    reweighting = gate / scale
    decorrelation = matmul(whitening, affine)
    reweighted = reweighting.view(gate.shape[0], *affine.shape[:2], 1) * affine
    matrix = torch.lerp(reweighted, decorrelation, lambda_)
    ce_matrix = None
    if p.alpha is not None:
        ce_matrix = matrix
        matrix = torch.lerp(affine, ce_matrix, p.alpha)
    return Mixture(
        lambda_=lambda_,
        reweighting=reweighting,
        decorrelation=decorrelation,
        ce_matrix=ce_matrix,
        matrix=matrix,
    )


class MixtureGradients(NamedTuple):
    """The gradients of what M [V | b] is made of."""

    affine: Tensor  # (G, d, J + 1)
    alpha: Optional[Tensor]  # (1,)
    theta: Tensor  # (1,)
    log_gate: Tensor  # (N, C)
    decorrelation: Optional[Tensor] = None  # of P [V | b], (G, d, J + 1), if CE trains
    log_inverse_scale: Optional[Tensor] = None  # (1,), of log(1 / s), likewise


def mix_backward(d_matrix: Tensor, saved: Saved, p: Parameters, trains: bool) -> MixtureGradients:
    """Return the gradients from that of M [V | b], (N, G, d, J + 1)."""
    d_alpha = None
    d_direct = None
    if p.alpha is not None:
        d_alpha = (d_matrix * (saved.ce_matrix - saved.affine)).sum().view(1)
        d_direct = torch.addcmul(d_matrix, d_matrix, p.alpha, value=-1).sum(0)
        d_matrix = d_matrix * p.alpha
    d_sum = d_matrix.sum(0)  # (G, d, J + 1)
    rows = d_matrix.flatten(1, 2)  # (N, C, J + 1)
    by_gate = dot_rows(rows, saved.affine.flatten(0, 1)) * saved.reweighting
    d_reweighted = sum_rows(saved.reweighting, rows).view_as(d_sum)
    towards_decorrelation = torch.dot(d_sum.flatten(), saved.decorrelation.flatten())
    towards_reweighting = by_gate.sum().view(1)
    d_affine = torch.lerp(d_reweighted, matmul(saved.whitening.mT, d_sum), saved.lambda_)
    gradients = MixtureGradients(
        affine=d_affine if d_direct is None else d_affine + d_direct,
        alpha=d_alpha,
        theta=torch.ops.aten.sigmoid_backward(towards_decorrelation - towards_reweighting, saved.lambda_),
        log_gate=_times_rest(by_gate, saved.lambda_),
    )
    if not trains:
        return gradients
    return gradients._replace(
        decorrelation=saved.lambda_ * d_sum,
        log_inverse_scale=_times_rest(towards_reweighting, saved.lambda_),
    )


def _times_rest(tensor: Tensor, lambda_: Tensor) -> Tensor:
    """Return (1 - lambda) times a tensor."""
    return torch.addcmul(tensor, tensor, lambda_, value=-1)
