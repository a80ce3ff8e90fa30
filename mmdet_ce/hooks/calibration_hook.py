"""Calibration of CE's running statistics as part of a training."""

from __future__ import annotations

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..calibration import calibrate


@HOOKS.register_module()
class CECalibrationHook(Hook):
    """Set CE's running statistics from training batches, at the start and, if asked, after every epoch.

    At the start for weights from other data, under ``norm_eval=True`` above all, which then keeps the statistics.
    After an epoch for the weights that the epoch made, before they are validated and saved. A resumed training keeps
    the statistics of its checkpoint at the start.

    Args:
        num_batches: Batches to average over, on each rank.
        with_bn: Whether to set BatchNorm's running mean and variance too.
        after_epoch: Whether to calibrate after every epoch, too.

    Example:
        >>> custom_hooks = [dict(type='CECalibrationHook', num_batches=100)]
    """

    priority = 'NORMAL'  # before the checkpoint is saved

    def __init__(self, num_batches: int = 100, with_bn: bool = False, after_epoch: bool = False) -> None:
        if num_batches < 1:
            raise ValueError(f'num_batches must be at least 1, got {num_batches}')
        self.num_batches = num_batches
        self.with_bn = with_bn
        self.after_epoch = after_epoch

    def before_train(self, runner: Runner) -> None:
        """Calibrate the weights that the training starts from."""
        if runner.iter == 0:
            self._calibrate(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Calibrate the weights that the epoch made."""
        if self.after_epoch:
            self._calibrate(runner)

    def _calibrate(self, runner: Runner) -> None:
        count = calibrate(runner.model, runner.train_dataloader, self.num_batches, self.with_bn)
        runner.logger.info(f'CE statistics{" and those of BN" if self.with_bn else ""} set from {count} batches')
