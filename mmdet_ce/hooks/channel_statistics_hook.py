"""What the channels do while a network trains."""

from __future__ import annotations

from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ..channel_analysis import RELATIVE_THRESHOLD, analyze_channels, network_input


@HOOKS.register_module()
class ChannelStatisticsHook(Hook):
    """Log a backbone's channels to the visualizer: ``inhibited/LAYER`` and, for CE, ``lambda/`` and ``decorrelation/``.

    Every ``interval`` iterations the images of the present batch pass through the backbone once more, in evaluation and
    without gradients, on the first rank only. The training itself is not changed: its weights stay the same to the
    bit, and the values are those that tools/analysis_tools/analyze_channels.py prints of a checkpoint, from fewer
    images. Layers are those of ``mmdet_ce.channel_analysis``; a network without CE can be watched too.

    - ``inhibited``: share of channels under ``relative_threshold`` of the layer's mean contribution.
    - ``lambda``: share of batch decorrelation in CE.
    - ``alpha``: share of CE in the output, of layers with ``identity_start``.
    - ``decorrelation``: off-diagonal energy of the covariance after CE over that before: 0 is all removed, 1 none.

    Args:
        interval: Iterations between two measurements.
        relative_threshold: Share of a layer's mean contribution under which a channel is inhibited.

    Raises:
        ValueError: If ``interval`` is not positive, or, when the training starts, if the model has no backbone.

    Example:
        >>> custom_hooks = [dict(type='ChannelStatisticsHook')]
    """

    def __init__(self, interval: int = 100, relative_threshold: float = RELATIVE_THRESHOLD) -> None:
        if interval < 1:
            raise ValueError(f'interval must be at least 1, got {interval}')
        self.interval = interval
        self.relative_threshold = relative_threshold

    def before_train(self, runner: Runner) -> None:
        """Check that there is something to measure."""
        if not hasattr(_unwrapped(runner), 'backbone'):
            raise ValueError(
                f'ChannelStatisticsHook needs a model with a backbone; {type(runner.model).__name__} has none'
            )

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Optional[dict] = None
    ) -> None:
        """Measure and log, if it is time."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        model = _unwrapped(runner)
        images = network_input(data_batch, model.data_preprocessor)
        scalars = {}
        for name, layer in analyze_channels(model.backbone, [images]).items():
            row = layer.measures(self.relative_threshold)
            scalars[f'inhibited/{name}'] = row['inhibited_relative']
            if layer.ce is not None:
                scalars[f'lambda/{name}'] = row['lambda']
                if layer.ce.alpha is not None:
                    scalars[f'alpha/{name}'] = row['alpha']
                before, after = row['off_diagonal_before'], row['off_diagonal_after']
                scalars[f'decorrelation/{name}'] = after / before if before else 1.0
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)


def _unwrapped(runner: Runner) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
