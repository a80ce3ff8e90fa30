"""Inverse square root of a covariance by Newton's iteration."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_sqrt_newton(covariance: Tensor, num_iterations: int) -> Tensor:
    """Approximate the inverse square root of ``covariance / trace(covariance)``.

    The paper iterates P <- 1.5 P - 0.5 P^3 Sigma_N from P = I. Here Y = P Sigma_N is carried along (the coupled
    Newton-Schulz form): the same P in exact arithmetic, but stable, where the single form diverges in float32 after
    some ten steps on an ill-conditioned covariance. The number of steps belongs to the model: after T = 3 the
    iteration is far from converged, and a checkpoint must run with the T that it was trained with.

    Args:
        covariance: (G, d, d), symmetric positive definite.
        num_iterations: Newton steps T, at least 1.

    Returns:
        P_T, (G, d, d).
    """
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    y = covariance / trace  # P_0 Sigma_N
    step = p = 1.5 * eye - 0.5 * y  # the first step, from P_0 = I
    for _ in range(num_iterations - 1):
        y = y @ step
        step = torch.baddbmm(eye, p, y, beta=1.5, alpha=-0.5)
        p = step @ p
    return p
