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

    This is for weights from other data, above all under ``norm_eval=True``, which then keeps the statistics. A resumed
    training keeps those of its checkpoint. For the weights that a training made, use tools/calibrate.py.

    Args:
        num_batches: Batches to average over, on each process.
        with_bn: Whether to set the running mean and variance of all BatchNorms too.

    Example:
        >>> custom_hooks = [dict(type='CECalibrationHook', num_batches=100)]
    """

    priority = 'ABOVE_NORMAL'  # before MeanTeacherHook copies the student

    def __init__(self, num_batches: int = 100, with_bn: bool = False) -> None:
        self.num_batches = num_batches
        self.with_bn = with_bn

    def before_train(self, runner: Runner) -> None:
        """Calibrate the weights that the training starts from."""
        if runner.iter > 0:  # resumed
            return
        # A loader of its own: the training's may have an infinite sampler, of which what is taken here would be gone.
        loader = runner.build_dataloader(copy.deepcopy(runner.cfg.train_dataloader), seed=runner.seed)
        count = calibrate(runner.model, loader, self.num_batches, self.with_bn)
        runner.logger.info(f'CE statistics{" and those of BN" if self.with_bn else ""} set from {count} batches')
