"""The Channel Equilibrium block.

Paper: `Channel Equilibrium Networks for Learning Deep Representation <https://arxiv.org/abs/2003.00214>`_ (ICML 2020).
Written anew from the paper's equations and the behaviour of the released network, Tangshitao/CENet.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import compat
from ..ops import channel_equilibrium
from ..ops.gate import LAYER_NORM_EPS
from ..ops.precision import in_backward_pass
from ..ops.records import Statistics


class BatchDecorrelation(nn.Module):
    """What the branch BD(x) = P_T x keeps: the running whitening matrix of each channel group."""

    def __init__(self, num_groups: int, group_size: int, num_iterations: int, eps: float) -> None:
        super().__init__()
        self.num_iterations = num_iterations
        self.eps = eps
        # The mean is kept as the released code keeps it; no output depends on it.
        self.register_buffer('running_mean', torch.zeros(num_groups, group_size, 1))
        self.register_buffer('running_whitening', torch.eye(group_size).repeat(num_groups, 1, 1))


class InstanceReweighting(nn.Module):
    """What the branch IR(x_n) = gate_n / s * x_n keeps: the gate's layers and the running scale (the paper's AII)."""

    def __init__(self, in_channels: int, reduction: int) -> None:
        super().__init__()
        hidden = in_channels // reduction
        self.fc1 = nn.Linear(in_channels, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.fc2 = nn.Linear(hidden, in_channels, bias=False)
        self.register_buffer('running_scale', torch.ones(1))

    @property
    def gate_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gate's W1, LayerNorm weight and bias, and W2."""
        return self.fc1.weight, self.norm.weight, self.norm.bias, self.fc2.weight


@MODELS.register_module()
class ChannelEquilibrium(nn.Module):
    r"""Channel Equilibrium, designed to balance how much each channel of a layer contributes.

    With :math:`\lambda = \mathrm{sigmoid}(\theta)`, the output of a normalization layer becomes

    .. math:: CE(x) = \lambda\,BD(x) + (1 - \lambda)\,IR(x)

    where batch decorrelation BD whitens each group of channels over the batch and instance reweighting IR gates each
    channel of each sample by its spatial variance. Both are linear in x once their statistics are known, so x is
    multiplied only once, by the matrix :math:`M_{n,g} = \lambda P_g + (1 - \lambda)\,diag(gate_{n,g} / s)`.

    In training the statistics are the batch's, and the running values move by ``momentum`` towards them. In evaluation
    the running P_T and s are used, at first I and 1. All but the products over x is computed in float32 at least.

    Paper: `Channel Equilibrium Networks for Learning Deep Representation <https://arxiv.org/abs/2003.00214>`_.

    Args:
        in_channels: Channels C of the input.
        num_channels: Channels d of a decorrelation group, 2 at least; halved until it divides ``in_channels``.
        num_iterations: Newton steps T. Part of the model: keep what a checkpoint was trained with.
        reduction: The gate's bottleneck has ``in_channels // reduction`` channels.
        eps: Ridge added to the covariance.
        momentum: Weight of the batch in the running values.
        identity_start: Whether the block starts as the identity: the output is (1 - alpha) x + alpha CE(x),
            with a parameter alpha that starts at 0. An extension of this project, for weights trained without CE.
        sync: Whether the batch of the training form is that of all processes, as in SyncBN. Otherwise each process has
            its own statistics, and a checkpoint holds those of rank 0.

    Shape:
        (N, C, H, W), float16, bfloat16, float32 or float64. The output is like the input, in memory format too.

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
        identity_start: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        counts = dict(
            in_channels=in_channels, num_channels=num_channels, num_iterations=num_iterations, reduction=reduction
        )
        for name, value in counts.items():
            least = 2 if name == 'num_channels' else 1
            if type(value) is not int or value < least:
                raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}')
        if reduction > in_channels:
            raise ValueError(f'reduction must be between 1 and in_channels={in_channels}, got {reduction}')
        for name, share in (('eps', eps), ('momentum', momentum)):
            if not 0 < share <= 1:
                raise ValueError(f'{name} must be in (0, 1], got {share}')
        self.in_channels = in_channels
        self.group_size = _group_size(in_channels, num_channels)
        self.num_groups = in_channels // self.group_size
        self.momentum = momentum
        self.sync = sync
        self.theta = nn.Parameter(torch.zeros(1))
        self.alpha = nn.Parameter(torch.zeros(1)) if identity_start else None
        self.bd = BatchDecorrelation(self.num_groups, self.group_size, num_iterations, eps)
        self.ir = InstanceReweighting(in_channels, reduction)

    @compat.outside_graphs
    def forward(
        self,
        x: Tensor,
        conv: Optional[nn.Conv2d] = None,
        norm: Optional[nn.BatchNorm2d] = None,
        shortcut: Optional[Tensor] = None,
        relu: bool = False,
    ) -> Tensor:
        """Return relu(CE(norm(conv(x))) + shortcut) for x, (N, C, H, W); what is left out is not applied.

        Args:
            x: The output of the norm before CE; its input where ``norm`` is given, and the convolution's with ``conv``.
            conv: A 1x1 convolution of stride 1 without bias, which is never applied on its own; needs ``norm``.
            norm: A BatchNorm, whose running values move if it trains.
            shortcut: The shortcut of a residual block, of the shape of the result.
            relu: Whether ReLU comes last.
        """
        self._check_input(x, conv)
        out, statistics = channel_equilibrium(
            x,
            self.theta,
            *self.ir.gate_parameters,
            group_size=self.group_size,
            num_iterations=self.bd.num_iterations,
            eps=self.bd.eps,
            running_whitening=None if self.training else self.bd.running_whitening,
            running_scale=None if self.training else self.ir.running_scale,
            alpha=self.alpha,
            conv_weight=None if conv is None else conv.weight,
            norm=norm,
            shortcut=shortcut,
            relu=relu,
            process_group=self._process_group(),
        )
        # Activation checkpointing runs the forward pass again inside the backward pass: that one must not count.
        if self.training and (compat.is_compiling() or not in_backward_pass()):
            self._update(statistics)
        return out

    def _process_group(self) -> Optional[dist.ProcessGroup]:
        """Return the processes that statistics are taken over; None for this one alone."""
        if not (self.sync and self.training and dist.is_available() and dist.is_initialized()):
            return None
        return dist.group.WORLD if dist.get_world_size() > 1 else None

    @torch.no_grad()
    def _update(self, statistics: Statistics) -> None:
        """Move the running values towards those of the batch, unless it is not finite."""
        running = [self.bd.running_mean, self.bd.running_whitening, self.ir.running_scale]
        values = [statistics.mean, statistics.whitening, statistics.scale]
        values = [torch.where(statistics.is_finite, value, old) for value, old in zip(values, running)]
        move = get_ema_multi_avg_fn(1 - self.momentum)
        move(running, [value.to(old.dtype) for value, old in zip(values, running)], None)

    @property
    def is_identity(self) -> bool:
        """Whether the block has started as the identity and CE has not grown in yet."""
        return self.alpha is not None and _is_true(self.alpha == 0)

    @property
    def lacks_statistics(self) -> bool:
        """Whether no data ever updated the running values: then P_T is still exactly I and the mean exactly 0."""
        eye = torch.eye(self.group_size, device=self.bd.running_whitening.device)
        return _is_true((self.bd.running_mean == 0).all() & (self.bd.running_whitening == eye).all())

    def _check_input(self, x: Tensor, conv: Optional[nn.Module]) -> None:
        channels = self.in_channels if conv is None else conv.in_channels
        has_shape = x.dim() == 4 and x.shape[1] == channels
        has_dtype = x.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        if not (has_shape and has_dtype and x.layout == torch.strided):
            raise ValueError(
                f'ChannelEquilibrium expects a dense tensor, (N, {channels}, H, W), of 16, 32 or '
                f'64-bit floats, got {tuple(x.shape)}, {x.dtype}, {x.layout}'
            )

    def extra_repr(self) -> str:
        """Describe the arguments that shape the block."""
        text = f'{self.in_channels}, num_channels={self.group_size}, num_iterations={self.bd.num_iterations}'
        if self.alpha is not None:
            text += ', identity_start=True'
        if self.sync:
            text += ', sync=True'
        return text


def _is_true(flag: Tensor) -> bool:
    """Return whether a tensor of one element is true; False for one that has no value: a meta or a fake tensor."""
    return type(flag) is Tensor and not flag.is_meta and bool(flag)


def _group_size(in_channels: int, num_channels: int) -> int:
    """Return d: ``num_channels``, halved until it divides ``in_channels`` (as the released code does)."""
    d = num_channels
    while in_channels % d:
        d //= 2
    if d == 1:
        raise ValueError(
            f'in_channels={in_channels} cannot be grouped: neither num_channels={num_channels} nor any of its halves '
            'above 1 divides it; choose a num_channels that shares a larger factor with it'
        )
    return d
