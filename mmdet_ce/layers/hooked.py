"""Whether a module has hooks, or a forward of its own."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as every_module

KINDS = ('forward_hooks', 'forward_pre_hooks', 'backward_hooks', 'backward_pre_hooks')


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, its own or those of every module, or a forward method of its own."""
    own = any(getattr(module, f'_{kind}') for kind in KINDS)
    return own or any(getattr(every_module, f'_global_{kind}') for kind in KINDS) or 'forward' in vars(module)
