"""The end of a residual block as one operation, relu(CE(norm(conv(x))) + shortcut), and what of it CE takes in."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from .. import compat
from ..ops.precision import convolves_faster, is_tracing
from .channel_equilibrium import ChannelEquilibrium

# CE goes through a convolution of C_in channels from this many positions a channel on. The moments cost C C_in^2 for
# each image, whatever its size, and save passes over a map of C channels. Measured on a CPU by
# `tools/benchmark_ce.py --what block`; docs/benchmarks.md has the table.
LEAST_POSITIONS_PER_CHANNEL = 16

KINDS = ('forward_hooks', 'forward_pre_hooks', 'backward_hooks', 'backward_pre_hooks')
OWN_HOOKS = tuple(f'_{kind}' for kind in KINDS)
GLOBAL_HOOKS = tuple(getattr(every_module, f'_global_{kind}') for kind in KINDS)


@compat.outside_graphs
def block_end(
    x: Tensor,
    norm: nn.Module,
    ce: Optional[nn.Module],
    conv: Optional[nn.Module] = None,
    shortcut: Optional[Tensor] = None,
    relu: Optional[nn.Module] = None,
) -> Tensor:
    """Return relu(CE(norm(conv(x))) + shortcut); what is None is left out.

    CE takes into its own product what is linear before it, the norm and a 1x1 convolution, and shortcut and ReLU after
    it. This is the only place that decides what is taken in. A module that computes anything else, or that has a hook,
    is called on its own. So is every module in an exported graph, whose runtime folds norms into convolutions itself.
    """
    if type(ce) is not ChannelEquilibrium or is_tracing() or x.numel() == 0 or is_hooked(ce):
        return _apart(x, norm, ce, conv, shortcut, relu)
    # Of a single value BatchNorm refuses to take the statistics
    takes_norm = _is_batch_norm(norm) and x.numel() > x.shape[1]
    takes_conv = takes_norm and conv is not None and _is_passed_through(conv, x)
    if conv is not None and not takes_conv:
        x = conv(x)
    if not takes_norm:
        x = norm(x)
    has_shortcut = shortcut is not None
    takes_shortcut = has_shortcut and shortcut.shape == (x.shape[0], ce.in_channels, *x.shape[2:])
    takes_relu = type(relu) is nn.ReLU and (takes_shortcut or not has_shortcut) and not is_hooked(relu)
    out = ce(
        x,
        conv=conv if takes_conv else None,
        norm=norm if takes_norm else None,
        shortcut=shortcut if takes_shortcut else None,
        relu=takes_relu,
    )
    if has_shortcut and not takes_shortcut:
        out += shortcut
    return out if relu is None or takes_relu else relu(out)


def _apart(
    x: Tensor,
    norm: nn.Module,
    ce: Optional[nn.Module],
    conv: Optional[nn.Module],
    shortcut: Optional[Tensor],
    relu: Optional[nn.Module],
) -> Tensor:
    """Return the same from one module after the other, as mmdet's blocks call them."""
    out = norm(x if conv is None else conv(x))
    if ce is not None:
        out = ce(out)
        if is_hooked(ce):
            out = out.clone()  # backward hooks have made a view of it, which cannot be changed in place
    if shortcut is not None:
        out += shortcut
    return out if relu is None else relu(out)


def _is_batch_norm(norm: nn.Module) -> bool:
    """Return whether CE can take a norm in: exactly a BatchNorm, and in training one of this process alone."""
    # Exactly these classes: a subclass may compute something else.
    if type(norm) is nn.SyncBatchNorm:
        return not norm.training and norm.running_mean is not None and not is_hooked(norm)
    return type(norm) is nn.BatchNorm2d and not is_hooked(norm)


def _is_passed_through(conv: nn.Module, x: Tensor) -> bool:
    """Return whether CE goes through a convolution: exactly a pointwise one, of a map that is large enough to pay."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.bias is None
        and x.shape[2] * x.shape[3] >= LEAST_POSITIONS_PER_CHANNEL * conv.in_channels
        and not convolves_faster(x)
        and not (x.dtype == torch.float32 and compat.is_autocast_enabled(x.device.type))  # it would return 16 bits
        and not is_hooked(conv)
    )


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks, its own or those of every module, or a forward method of its own."""
    own = vars(module)
    return 'forward' in own or any(GLOBAL_HOOKS) or any(own[hooks] for hooks in OWN_HOOKS)
