"""What the channels do while a network trains."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ..channel_analysis import INHIBITED_BELOW, watch_channels


@HOOKS.register_module()
class ChannelStatisticsHook(Hook):
    """Log a network's channels to the visualizer: ``inhibited/LAYER`` and, for CE, ``lambda/`` and ``decorrelation/``.

    Every ``interval`` iterations the training's own forward pass is measured, on the first rank only, wherever in the
    model the norms and CE layers are. A network without CE can be watched too, and trains the same to the bit. With CE,
    such an iteration is the same up to rounding, since CE then leaves the norm, shortcut and ReLU to their own modules.

    - ``inhibited``: share of channels under ``threshold`` of the layer's mean contribution.
    - ``lambda``: share of batch decorrelation in CE.
    - ``alpha``: share of CE in the output, of layers with ``identity_start``.
    - ``decorrelation``: off-diagonal energy of the covariance after CE over that before: 0 is all removed, 1 none.

    Args:
        interval: Iterations between two measurements.
        threshold: Share of a layer's mean contribution under which a channel is inhibited.
    """

    def __init__(self, interval: int = 100, threshold: float = INHIBITED_BELOW) -> None:
        self.interval = interval
        self.threshold = threshold
        self.watch = ExitStack()
        self.layers = {}

    @master_only
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Start to measure, if it is time."""
        if self.every_n_train_iters(runner, self.interval):
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            self.layers = self.watch.enter_context(watch_channels(model))

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Optional[dict] = None
    ) -> None:
        """Log what was measured."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        self.watch.close()
        scalars = {}
        for name, layer in self.layers.items():
            row = layer.measures(self.threshold)
            scalars[f'inhibited/{name}'] = row['inhibited']
            if 'lambda' in row:
                before = row['off_diagonal_before']
                scalars[f'lambda/{name}'] = row['lambda']
                scalars[f'decorrelation/{name}'] = row['off_diagonal_after'] / before if before else 1.0
            if 'alpha' in row:
                scalars[f'alpha/{name}'] = row['alpha']
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
