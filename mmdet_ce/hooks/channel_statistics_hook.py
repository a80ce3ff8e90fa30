"""What the channels do while a network trains."""

from __future__ import annotations

from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ..channel_analysis import INHIBITED_BELOW, analyze_channels


@HOOKS.register_module()
class ChannelStatisticsHook(Hook):
    """Log a backbone's channels to the visualizer: ``inhibited/LAYER`` and, for CE, ``lambda/`` and ``decorrelation/``.

    Every ``interval`` iterations the images of the present batch pass through the backbone once more, in evaluation, on
    the first rank only. The weights of the training stay the same to the bit. A network without CE can be watched too.

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

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Optional[dict] = None
    ) -> None:
        """Measure and log, if it is time."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        images = model.data_preprocessor(dict(inputs=data_batch['inputs']), False)['inputs']
        scalars = {}
        for name, layer in analyze_channels(model.backbone, [images]).items():
            row = layer.measures(self.threshold)
            scalars[f'inhibited/{name}'] = row['inhibited']
            if layer.ce is not None:
                before = row['off_diagonal_before']
                scalars[f'lambda/{name}'] = row['lambda']
                scalars[f'decorrelation/{name}'] = row['off_diagonal_after'] / before if before else 1.0
            if 'alpha' in row:
                scalars[f'alpha/{name}'] = row['alpha']
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
