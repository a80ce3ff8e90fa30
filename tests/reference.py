"""Channel Equilibrium written down plainly, as an oracle for the tests: it shares nothing with the form that trains.

Paper: `Channel Equilibrium Networks for Learning Deep Representation <https://arxiv.org/abs/2003.00214>`_.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReferenceOutput(NamedTuple):
    """What one pass of the block computes."""

    out: Tensor  # (N, C, H, W)
    mean: Optional[Tensor]  # (G, d, 1), batch mean; None in evaluation
    whitening: Tensor  # (G, d, d), P_T of the batch, or the running one in evaluation
    scale: Tensor  # (1,), s of the batch, or the running one in evaluation


def channel_equilibrium_reference(
    x: Tensor,
    theta: Tensor,
    fc1_weight: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc2_weight: Tensor,
    *,
    group_size: int,
    num_iterations: int = 3,
    eps: float = 1e-5,
    running_whitening: Optional[Tensor] = None,
    running_scale: Optional[Tensor] = None,
    alpha: Optional[Tensor] = None,
    conv_weight: Optional[Tensor] = None,
    norm: Optional[nn.BatchNorm2d] = None,
    shortcut: Optional[Tensor] = None,
    relu: bool = False,
) -> ReferenceOutput:
    """Return relu(CE(norm(conv(x))) + shortcut), CE equation by equation as in the paper.

    Arguments and results are those of ``channel_equilibrium``, but that a norm moves its own running values.
    Differentiable, in the dtype of ``x`` (use float64).
    """
    if conv_weight is not None:
        x = F.conv2d(x, conv_weight)
    if norm is not None:
        x = norm(x)
    n, c, h, w = x.shape
    d, length = group_size, h * w
    evaluation = running_whitening is not None and running_scale is not None

    # Batch decorrelation: one matrix a group, from all N * H * W positions.
    groups = x.reshape(n, c // d, d, length).permute(1, 2, 0, 3).reshape(c // d, d, n * length)  # (G, d, N L)
    if evaluation:
        mean, whitening = None, running_whitening
    else:
        mean = groups.mean(dim=2, keepdim=True)  # (G, d, 1)
        whitening = []
        for samples, mu in zip(groups, mean):
            centred = samples - mu
            sigma = eps * torch.eye(d, dtype=x.dtype, device=x.device) + centred @ centred.T / (n * length)
            sigma_n = sigma / torch.trace(sigma)
            p = torch.eye(d, dtype=x.dtype, device=x.device)
            for _ in range(num_iterations):
                p = 1.5 * p - 0.5 * torch.linalg.matrix_power(p, 3) @ sigma_n
            whitening.append(p)
        whitening = torch.stack(whitening)  # (G, d, d)
    decorrelated = torch.einsum('gij,ngjhw->ngihw', whitening, x.reshape(n, c // d, d, h, w)).reshape(n, c, h, w)

    # Instance reweighting: one gate a sample and channel, one scale a batch.
    spatial_mean = x.mean(dim=(2, 3), keepdim=True)
    variance = (x - spatial_mean).square().sum(dim=(2, 3)) / max(length - 1, 1)  # (N, C), a 1x1 map has variance 0
    if evaluation:
        scale = running_scale
    else:
        scale = variance.mean().reshape(1)
        # A batch without any spatial variance leaves nothing to equalize: s = 1, where the paper's formula has 0 / 0.
        scale = torch.ones_like(scale) if scale == 0 else scale.sqrt()
    gates = []
    for v in variance:
        hidden = fc1_weight @ v
        hidden = (hidden - hidden.mean()) / torch.sqrt(hidden.var(correction=0) + 1e-5)
        hidden = torch.relu(ln_weight * hidden + ln_bias)
        gates.append(torch.sigmoid(fc2_weight @ hidden))
    gate = torch.stack(gates)  # (N, C)
    reweighted = (gate / scale)[:, :, None, None] * x

    lam = torch.sigmoid(theta)
    out = lam * decorrelated + (1 - lam) * reweighted
    if alpha is not None:
        out = (1 - alpha) * x + alpha * out
    if shortcut is not None:
        out = out + shortcut
    return ReferenceOutput(torch.relu(out) if relu else out, mean, whitening, scale)
