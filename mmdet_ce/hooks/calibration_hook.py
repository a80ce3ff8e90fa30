"""Calibration of CE's running statistics as part of a training."""

from __future__ import annotations

import copy

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..calibration import calibrate


@HOOKS.register_module()
class CECalibrationHook(Hook):
    """Set CE's running statistics from training batches before a training starts.

    For weights from other data, under ``norm_eval=True`` above all, which then keeps the statistics. A resumed training
    keeps those of its checkpoint. To calibrate the weights that a training made, use tools/calibrate.py.

    Args:
        num_batches: Batches to average over, on each rank.
        with_bn: Whether to set BatchNorm's running mean and variance too.

    Raises:
        ValueError: If ``num_batches`` is not positive, or, when the training starts, if the Runner has no config of a
            training data loader.

    Example:
        >>> custom_hooks = [dict(type='CECalibrationHook', num_batches=100)]
    """

    def __init__(self, num_batches: int = 100, with_bn: bool = False) -> None:
        if num_batches < 1:
            raise ValueError(f'num_batches must be at least 1, got {num_batches}')
        self.num_batches = num_batches
        self.with_bn = with_bn

    def before_train(self, runner: Runner) -> None:
        """Calibrate the weights that the training starts from."""
        if runner.iter > 0:  # resumed
            return
        cfg = runner.cfg.get('train_dataloader')
        if not isinstance(cfg, dict):
            raise ValueError('CECalibrationHook needs the config of the training data loader: use Runner.from_cfg')
        # A loader of its own: the training's may have an infinite sampler, of which what is taken here would be gone.
        loader = runner.build_dataloader(copy.deepcopy(cfg), seed=runner.seed)
        count = calibrate(runner.model, loader, self.num_batches, self.with_bn)
        runner.logger.info(f'CE statistics{" and those of BN" if self.with_bn else ""} set from {count} batches')
