"""Count what a pass launches and how often it reads or writes a map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# operators that start no kernel: they answer questions, or return memory as it is
NO_LAUNCH = ('empty', 'new_empty', 'detach', '_unsafe_view', 'promote_types', 'is_same_size')


class Budget(TorchDispatchMode):
    """Count operations that start a kernel, and the map-sized tensors that they read and write.

    Args:
        map_size: Elements from which a tensor counts as a map.
    """

    def __init__(self, map_size: int) -> None:
        super().__init__()
        self.map_size = map_size
        self.launches = 0
        self.maps = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        arguments = zip(func._schema.arguments, args)
        views = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if views or func.__name__.startswith(NO_LAUNCH):
            return result
        self.launches += 1
        changed = [t for a, t in arguments if a.alias_info is not None]
        changed += [t for t in (kwargs or {}).values() if isinstance(t, Tensor)]  # out=
        results = result if isinstance(result, (tuple, list)) else [result]
        reads = {t.data_ptr() for t in args if self._is_map(t)}
        writes = {t.data_ptr() for t in (*changed, *results) if self._is_map(t)}
        self.maps += len(reads) + len(writes)
        return result

    def _is_map(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.numel() >= self.map_size

    def take(self) -> tuple[int, int]:
        """Return both counts and start again from 0."""
        counts = self.launches, self.maps
        self.launches = self.maps = 0
        return counts


def layer_budget(ce: torch.nn.Module, x: Tensor, norm, tail: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return launches and map-sized reads and writes of a layer, forward and backward."""
    x = x.detach().requires_grad_()
    shortcut, grad = torch.randn_like(x).requires_grad_() if tail else None, torch.randn_like(x)
    with Budget(x.numel()) as budget:
        out = ce(x, norm, shortcut, relu=tail)
        forward = budget.take()
        out.backward(grad)
        return forward, budget.take()
