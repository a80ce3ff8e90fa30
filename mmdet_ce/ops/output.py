"""What one pass of the operator returns."""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor


class CEOutput(NamedTuple):
    """The output of Channel Equilibrium and the statistics it was computed with."""

    out: Tensor  # (N, C, H, W)
    mean: Optional[Tensor]  # (G, d, 1), mu of the batch; None in evaluation
    whitening: Tensor  # (G, d, d), P_T of the batch, or the running one in evaluation
    scale: Tensor  # (1,), s of the batch, or the running one in evaluation
