"""The hook that soak_resume.py puts into a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed


@HOOKS.register_module()
class SoakHook(Hook):
    """Save what a resumed training loaded, and count its iterations.

    Args:
        seed: If given, random numbers are drawn from it and the iteration's number alone.
    """

    priority = 'HIGHEST'

    def __init__(self, seed: Optional[int] = None) -> None:
        self.seed = seed

    def before_train(self, runner: Runner) -> None:
        """Save the state before another hook or an iteration changes it."""
        self.folder = Path(runner.work_dir, 'soak')
        self.folder.mkdir(exist_ok=True)
        if runner.iter:
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            runner.save_checkpoint(str(self.folder), 'resumed.pth', meta=meta, backend_args=dict(backend='atomic'))
        self.after_train_iter(runner, -1)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed what the first batch draws."""
        if self.seed is not None:
            set_random_seed(self.seed + runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the iteration and the next batch draw."""
        self.before_train_epoch(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Leave the number of iterations where a kill does not take it."""
        (self.folder / 'iterations').write_text(str(runner.iter + (batch_idx >= 0)))
