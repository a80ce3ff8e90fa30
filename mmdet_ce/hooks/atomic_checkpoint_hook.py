"""Checkpoints that survive a kill at any moment."""

from __future__ import annotations

import os.path as osp
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional, Union

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import Runner

from ..checkpoints import FolderLock, lock_folder, whole_file


@register_backend('atomic')
class AtomicLocalBackend(LocalBackend):
    """mmengine's backend of local files, in which a file is written whole or not at all."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write bytes to ``filepath``."""
        with whole_file(filepath) as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: Union[str, Path], encoding: str = 'utf-8') -> None:
        """Write text to ``filepath``."""
        self.put(obj.encode(encoding), filepath)


# mmengine's registry serves the bare name in every scope, mmdet's serves 'mmdet.AtomicCheckpointHook'.
@MMENGINE_HOOKS.register_module()
@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, such that a training killed at any moment has a whole checkpoint to resume from.

    mmengine writes a checkpoint, and ``last_checkpoint``, in place, and deletes the outdated ones, the previous best
    too, before it writes the new one: with ``max_keep_ckpts=1`` a kill then loses the run. Here the new file is written
    beside its place and moved there, then ``last_checkpoint`` names it, then the outdated ones go. So there is one more
    than ``max_keep_ckpts`` while one is written. Two trainings cannot write to one folder at a time.

    Args:
        *args: Arguments of CheckpointHook, in its order.
        **kwargs: Arguments of CheckpointHook. Without ``backend_args`` and ``file_client_args`` local files are written
            whole or not at all; a backend that is given there is used as it is.

    Raises:
        FolderInUseError: When the training starts, if another process trains in the same folder.

    Example:
        >>> default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.backend_args is None and self.file_client_args is None and '://' not in str(self.out_dir):
            self.backend_args = dict(backend='atomic')
        self._locks: list[Optional[FolderLock]] = []

    def before_train(self, runner: Runner) -> None:
        """Take the folders for this training alone, and remove what a kill left in them."""
        if is_main_process():
            self._locks = [lock_folder(runner.work_dir)]
        super().before_train(runner)
        if not is_main_process():
            return
        if self.max_keep_ckpts > 0:
            outdated = runner.message_hub.runtime_info.get('outdated_ckpt_ids', [])
            self._remove_steps(step for step in outdated if step not in self.keep_ckpt_ids)
        if isinstance(self.file_backend, AtomicLocalBackend):
            Path(self.out_dir).mkdir(parents=True, exist_ok=True)
            self._locks.append(lock_folder(self.out_dir))
            for folder in {self.out_dir, runner.work_dir}:
                for leftover in Path(folder).glob('.*.????????.tmp'):
                    leftover.unlink(missing_ok=True)

    def after_run(self, runner: Runner) -> None:
        """Give the folders back."""
        super().after_run(runner)
        self._locks = []

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Write the checkpoint, then name it as the last one, then delete the outdated ones."""
        outdated = []
        if self.max_keep_ckpts > 0:
            kept = [*(other for other in self.keep_ckpt_ids if other != step), step]
            outdated, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', kept)
            # A training that is resumed from this checkpoint deletes those that a kill between here and there leaves.
            runner.message_hub.update_info('outdated_ckpt_ids', outdated)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            AtomicLocalBackend().put_text(self.last_ckpt, osp.join(runner.work_dir, 'last_checkpoint'))
            self._remove_steps(outdated)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Write the new best checkpoint, then delete the previous one."""
        if not self.save_best:
            return
        several = len(self.key_indicators) > 1
        previous = dict(self.best_ckpt_path_dict) if several else {'': self.best_ckpt_path}
        # the base class deletes the previous one first, if it knows of one
        if several:
            self.best_ckpt_path_dict = dict.fromkeys(previous)
        else:
            self.best_ckpt_path = None
        super()._save_best_checkpoint(runner, metrics)
        best = self.best_ckpt_path_dict if several else {'': self.best_ckpt_path}
        for key, path in previous.items():
            if best[key] is None:  # not better
                best[key] = path
            elif path not in (None, best[key]) and is_main_process():
                self._remove_best(runner, path)
        if not several:
            self.best_ckpt_path = best['']

    def _remove_best(self, runner: Runner, path: str) -> None:
        """Delete a previous best checkpoint, unless it belongs to the training that this one was resumed from."""
        folders = (osp.realpath(folder) for folder in (self.out_dir, runner.work_dir))
        if osp.realpath(osp.dirname(path)) not in folders:
            runner.logger.info(f'The previous best checkpoint {path} is of another folder and stays')
        elif self._remove(path):
            runner.logger.info(f'The previous best checkpoint {path} is removed')

    def _remove_steps(self, steps: Iterable[int]) -> None:
        for step in steps:
            self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)))

    def _remove(self, path: str) -> bool:
        """Delete a checkpoint, which is a folder in DeepSpeed; return whether there was one."""
        backend = getattr(self.file_backend, 'client', self.file_backend)  # mmengine's FileClient has no rmtree
        if backend.isfile(path):
            backend.remove(path)
        elif backend.isdir(path):
            backend.rmtree(path)
        else:
            return False
        return True
