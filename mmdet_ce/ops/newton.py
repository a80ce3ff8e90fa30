"""Whitening: the inverse square root of a covariance, of trace 1, by Newton's iteration."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import add_matmul, matmul
from .records import Saved


class Whitening(NamedTuple):
    """The whitening matrix of each group; the fields are those of ``Saved``."""

    trace: Tensor  # (G, 1, 1), of Sigma
    normalized: Tensor  # (G, d, d), Sigma_N = Sigma / trace
    whitening: Tensor  # (G, d, d), P_T


def whiten(covariance: Tensor, eps: float, num_iterations: int) -> Whitening:
    """Return P_T of Sigma = covariance + eps I, (G, d, d). The covariance becomes Sigma in place."""
    sigma = covariance
    sigma.diagonal(dim1=1, dim2=2).add_(eps)
    trace = sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    normalized = sigma / trace
    return Whitening(trace=trace, normalized=normalized, whitening=inverse_sqrt_newton(normalized, num_iterations))


def whiten_backward(d_whitening: Tensor, num_iterations: int, saved: Saved) -> Tensor:
    """Return the gradient of the covariance, (G, d, d), symmetric, from that of P_T.

    Through Sigma_N = Sigma / trace(Sigma): dSigma = (dSigma_N - <dSigma_N, Sigma_N> I) / trace(Sigma).
    """
    d_normalized = inverse_sqrt_newton_derivative(saved.normalized, d_whitening, num_iterations)
    along = (d_normalized * saved.normalized).sum((1, 2))
    d_normalized.diagonal(dim1=1, dim2=2).sub_(along[:, None])
    return d_normalized / saved.trace


def inverse_sqrt_newton(normalized: Tensor, num_iterations: int) -> Tensor:
    """Return P_T, (G, d, d), which approximates the inverse square root of Sigma_N, a covariance of trace 1.

    The paper iterates P <- 1.5 P - 0.5 P^3 Sigma_N from P = I. Here Y = P Sigma_N is carried along (the coupled
    Newton-Schulz form): the same P in exact arithmetic, but stable, where the single form diverges in float32 after
    some ten steps. Evaluation uses the stored P_T; a training that goes on with another T changes
    the network.
    """
    identity = torch.eye(normalized.shape[-1], dtype=normalized.dtype, device=normalized.device)  # P_0
    y = normalized  # Y_0 = P_0 Sigma_N
    p = torch.lerp(identity, y, -0.5)  # 1.5 I - 0.5 Sigma_N, the first step
    step = p
    for _ in range(num_iterations - 1):
        y = matmul(y, step)
        step = add_matmul(identity, p, y, beta=1.5, alpha=-0.5)
        p = matmul(step, p)
    return p


def inverse_sqrt_newton_derivative(normalized: Tensor, direction: Tensor, num_iterations: int) -> Tensor:
    """Return the derivative of ``inverse_sqrt_newton`` in a direction, which is its gradient too.

    P_T is a polynomial f of the symmetric Sigma_N, so the adjoint of its derivative is that derivative itself, and it
    is a corner of f of a matrix of twice the size (Higham, Functions of Matrices, 2008, theorem 3.6):

        f([[Sigma_N, E], [0, Sigma_N]]) = [[f(Sigma_N), f'(Sigma_N)[E]], [0, f(Sigma_N)]]

    E is a direction, or the gradient with respect to P_T, of which the symmetric part counts. All are (G, d, d).
    """
    d = normalized.shape[-1]
    symmetric = torch.lerp(direction, direction.mT, 0.5)
    upper = torch.cat([normalized, symmetric], 2)
    lower = F.pad(normalized, (d, 0))
    block = torch.cat([upper, lower], 1)
    return inverse_sqrt_newton(block, num_iterations)[:, :d, d:]
