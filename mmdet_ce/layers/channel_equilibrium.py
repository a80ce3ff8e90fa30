"""The Channel Equilibrium block.

Paper: `Channel Equilibrium Networks for Learning Deep Representation <https://arxiv.org/abs/2003.00214>`_ (ICML 2020).
Written anew from the paper's equations and the behaviour of the released network, Tangshitao/CENet.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import Moments, affine_of, inverse_sqrt_newton, mix, no_autocast


class _RunningStatistic(nn.Module):
    """A branch with running values, updated once for each training forward pass."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum

    @torch.no_grad()
    def _update(self, running: Tensor, batch: Tensor) -> None:
        # Activation checkpointing runs the forward pass again inside the backward pass: that one must not count.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            running.lerp_(batch.to(running.dtype), self.momentum)


class BatchDecorrelation(_RunningStatistic):
    """The branch BD(x) = P_T x: one whitening matrix for each channel group, from the whole batch.

    Args:
        num_groups: Channel groups G.
        group_size: Channels d of a group.
        num_iterations: Newton steps T.
        eps: Ridge added to the covariance.
        momentum: Weight of the batch in the running values.
    """

    def __init__(self, num_groups: int, group_size: int, num_iterations: int, eps: float, momentum: float) -> None:
        super().__init__(momentum)
        self.num_iterations = num_iterations
        self.eps = eps
        self.register_buffer('running_mean', torch.zeros(num_groups, group_size, 1))
        self.register_buffer('running_whitening', torch.eye(group_size).repeat(num_groups, 1, 1))

    def forward(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Return P_T, (G, d, d), of the batch's mean (G, d, 1) and covariance (G, d, d); update the running values."""
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        whitening = inverse_sqrt_newton(covariance + self.eps * eye, self.num_iterations)
        self._update(self.running_mean, mean)  # kept as the released code keeps it; no output depends on it
        self._update(self.running_whitening, whitening)
        return whitening


class InstanceReweighting(_RunningStatistic):
    """The branch IR(x_n) = gate_n / s * x_n: one gate for each sample and channel (the paper's AII).

    Args:
        in_channels: Channels C.
        reduction: The gate's bottleneck has C / reduction channels.
        momentum: Weight of the batch in the running value.
    """

    def __init__(self, in_channels: int, reduction: int, momentum: float) -> None:
        super().__init__(momentum)
        hidden = in_channels // reduction
        self.fc1 = nn.Linear(in_channels, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, in_channels, bias=False)
        self.register_buffer('running_scale', torch.ones(1))

    @property
    def gate_parameters(self) -> tuple[Tensor, ...]:
        """The gate's W1, LayerNorm weight and bias, and W2."""
        return self.fc1.weight, self.norm.weight, self.norm.bias, self.fc2.weight

    def gate(self, variance: Tensor, w1: Tensor, norm_weight: Tensor, norm_bias: Tensor, w2: Tensor) -> Tensor:
        """Return sigmoid(W2 relu(LayerNorm(W1 v))), (N, C), of the spatial variance v, (N, C)."""
        w1, norm_weight, norm_bias, w2 = (t.to(variance.dtype) for t in (w1, norm_weight, norm_bias, w2))
        hidden = F.layer_norm(F.linear(variance, w1), norm_bias.shape, norm_weight, norm_bias, self.norm.eps)
        return torch.sigmoid(F.linear(F.relu(hidden), w2))

    def batch_scale(self, moments: Moments) -> Tensor:
        """Return s = sqrt(mean of v), (1,), and update its running value.

        A batch without spatial variance (all-zero, constant or 1x1 maps; the network's first step when
        ``zero_init_residual`` zeroes the norm before CE) has nothing to be equalized: s = 1, where the formula has 0/0.
        """
        mean_variance = moments.variance.mean().reshape(1)
        mean_square = moments.covariance.detach().diagonal(dim1=1, dim2=2).mean() + moments.mean.square().mean()
        # Beside the mean square, less than what rounding leaves of a constant in the moments.
        has_variance = mean_variance > (8 * torch.finfo(mean_variance.dtype).eps) ** 2 * mean_square
        scale = torch.where(has_variance, mean_variance, torch.ones_like(mean_variance)).sqrt()
        self._update(self.running_scale, scale)
        return scale


@MODELS.register_module()
class ChannelEquilibrium(nn.Module):
    r"""Channel Equilibrium: makes the channels of one layer contribute equally.

    With :math:`\lambda = \mathrm{sigmoid}(\theta)`, the output of a normalization layer becomes

    .. math:: CE(x) = \lambda\,BD(x) + (1 - \lambda)\,IR(x)

    where batch decorrelation BD whitens each group of channels over the batch and instance reweighting IR gates each
    channel of each sample by its spatial variance. Both are linear in x once their statistics are known, so x is
    multiplied only once, by the matrix :math:`M_{n,g} = \lambda P_g + (1 - \lambda)\,diag(gate_{n,g} / s)`.

    In training the statistics are the batch's, gradients flow through them, and the running values move by
    ``momentum`` towards them. In evaluation the running P_T and s are used and left alone, and the gate stays per
    sample. Before any data was seen they are P_T = I and s = 1. Statistics, iteration and gate are computed in float32
    at least, under autocast too; the output has the dtype of the input.

    Paper: `Channel Equilibrium Networks for Learning Deep Representation <https://arxiv.org/abs/2003.00214>`_.

    Args:
        in_channels: Channels C of the input.
        num_channels: Channels d of a decorrelation group; halved until it divides ``in_channels``.
        num_iterations: Newton steps T. Part of the model: keep what a checkpoint was trained with.
        reduction: The gate's bottleneck has ``in_channels // reduction`` channels.
        eps: Ridge added to the covariance.
        momentum: Weight of the batch in the running values.

    Shape:
        - Input: (N, C, H, W), any floating dtype.
        - Output: the same shape, dtype and memory format.

    Raises:
        ValueError: If the channels cannot be grouped, an argument is out of range, or an input is not (N, C, H, W),
            is empty, or has another C.

    Example:
        >>> import torch
        >>> from mmdet_ce import ChannelEquilibrium
        >>> ce = ChannelEquilibrium(64)
        >>> tuple(ce(torch.rand(2, 64, 8, 8)).shape)
        (2, 64, 8, 8)
    """

    def __init__(
        self,
        in_channels: int,
        num_channels: int = 16,
        num_iterations: int = 3,
        reduction: int = 4,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.group_size = _group_size(in_channels, num_channels)
        if num_iterations < 1:
            raise ValueError(f'num_iterations must be at least 1, got {num_iterations}')
        if not 1 <= reduction <= in_channels:
            raise ValueError(f'reduction must be between 1 and in_channels={in_channels}, got {reduction}')
        if eps <= 0:
            raise ValueError(f'eps must be positive, got {eps}')
        if not 0 < momentum <= 1:
            raise ValueError(f'momentum must be in (0, 1], got {momentum}')
        self.num_groups = in_channels // self.group_size
        self.theta = nn.Parameter(torch.zeros(1))
        self.bd = BatchDecorrelation(self.num_groups, self.group_size, num_iterations, eps, momentum)
        self.ir = InstanceReweighting(in_channels, reduction, momentum)

    def forward(self, x: Tensor, norm: Optional[_BatchNorm] = None) -> Tensor:
        """Apply the block to ``x``, (N, C, H, W), or, folded into one product, to ``norm(x)``.

        Args:
            x: The output of the norm before CE, or its input where ``norm`` is given.
            norm: A BatchNorm in evaluation, which is an affine map of each channel.
        """
        self._check_input(x)
        with no_autocast(x):
            return mix(
                x,
                self.group_size,
                self._matrix,
                (self.theta, *self.ir.gate_parameters),
                with_covariance=self.training,
                affine=None if norm is None else affine_of(norm),
            )

    def _matrix(self, moments: Moments, theta: Tensor, *gate_parameters: Tensor) -> Tensor:
        """Return M = lambda P + (1 - lambda) diag(gate / s), (N, G, d, d)."""
        dtype = moments.variance.dtype
        if self.training:
            whitening = self.bd(moments.mean, moments.covariance)
            scale = self.ir.batch_scale(moments)
        else:
            # Cloned: a training pass may update the buffers in place before this graph's backward pass.
            whitening = self.bd.running_whitening.to(dtype, copy=True)
            scale = self.ir.running_scale.to(dtype, copy=True)
        reweighting = self.ir.gate(moments.variance, *gate_parameters) / scale  # (N, C)
        lam = torch.sigmoid(theta.to(dtype))
        diagonal = ((1 - lam) * reweighting).unflatten(1, (self.num_groups, self.group_size)).diag_embed()
        return lam * whitening + diagonal

    @property
    def lacks_statistics(self) -> bool:
        """Whether no data ever updated the running values: then P_T is still exactly I and the mean exactly 0."""
        eye = torch.eye(self.group_size, device=self.bd.running_whitening.device)
        return bool((self.bd.running_mean == 0).all() and (self.bd.running_whitening == eye).all())

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.numel() == 0:
            raise ValueError(
                f'ChannelEquilibrium expects a non-empty (N, {self.in_channels}, H, W) tensor, got {tuple(x.shape)}'
            )
        if not x.is_floating_point():
            raise ValueError(f'ChannelEquilibrium expects a floating-point tensor, got {x.dtype}')

    def extra_repr(self) -> str:
        """Describe the grouping."""
        return f'{self.in_channels}, num_channels={self.group_size}, num_iterations={self.bd.num_iterations}'


def _group_size(in_channels: int, num_channels: int) -> int:
    """Return d: ``num_channels``, halved until it divides ``in_channels`` (as the released code does)."""
    if in_channels < 1 or num_channels < 1:
        raise ValueError(f'in_channels and num_channels must be positive, got {in_channels} and {num_channels}')
    d = num_channels
    while in_channels % d:
        d //= 2
    if d == 1 and num_channels > 1:
        raise ValueError(
            f'in_channels={in_channels} cannot be grouped: neither num_channels={num_channels} nor any of its halves '
            'above 1 divides it; choose a num_channels that shares a larger factor with it'
        )
    return d
