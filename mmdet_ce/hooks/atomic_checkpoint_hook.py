"""Checkpoints that survive a kill at any moment."""

from __future__ import annotations

import os.path as osp
from collections import deque
from pathlib import Path
from typing import Any, Optional, TextIO, Union

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..checkpoints import lock_folder, whole_file


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


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, such that a training killed at any moment has a whole checkpoint to resume from.

    mmengine writes a checkpoint, and ``last_checkpoint``, in place, and deletes the outdated ones, the previous best
    too, before it writes the new one: with ``max_keep_ckpts=1`` a kill then loses the run. Here the new file is written
    beside its place and moved there, then ``last_checkpoint`` names it, then the outdated ones go.

    Args:
        max_keep_ckpts: As in CheckpointHook. While a checkpoint is written, there is one more.
        backend_args: As in CheckpointHook; by default local files are written whole or not at all.
        **kwargs: Arguments of CheckpointHook.

    Example:
        >>> default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1))
    """

    def __init__(self, *, backend_args: Optional[dict] = None, **kwargs: Any) -> None:
        remote = '://' in str(kwargs.get('out_dir'))
        if backend_args is None and kwargs.get('file_client_args') is None and not remote:
            backend_args = dict(backend='atomic')
        super().__init__(backend_args=backend_args, **kwargs)
        self._lock: Optional[TextIO] = None

    def before_train(self, runner: Runner) -> None:
        """Take the work directory for this training alone, and remove what a kill in the middle of writing left."""
        if is_main_process():
            self._lock = lock_folder(runner.work_dir)
        super().before_train(runner)
        self._forget_other_folders(runner)
        if is_main_process() and isinstance(self.file_backend, AtomicLocalBackend):
            for folder in {self.out_dir, runner.work_dir}:
                for leftover in Path(folder).glob('.*.????????.tmp'):
                    leftover.unlink(missing_ok=True)

    def after_run(self, runner: Runner) -> None:
        """Give the work directory back."""
        super().after_run(runner)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _forget_other_folders(self, runner: Runner) -> None:
        """Forget best checkpoints of other folders, which a resumed training remembers: a better one deletes them."""
        folders = {Path(folder).absolute() for folder in (self.out_dir, runner.work_dir)}

        def own(path: Optional[str]) -> Optional[str]:
            if path is None or '://' in str(self.out_dir) or Path(path).absolute().parent in folders:
                return path
            print_log(f'{path}, the best checkpoint so far, is of another folder and stays', logger='current')
            return None

        if len(getattr(self, 'key_indicators', [])) > 1:
            self.best_ckpt_path_dict = {key: own(path) for key, path in self.best_ckpt_path_dict.items()}
        elif self.save_best:
            self.best_ckpt_path = own(self.best_ckpt_path)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Write the checkpoint, then name it as the last one, then delete the outdated ones."""
        outdated = []
        if self.max_keep_ckpts > 0:
            kept = [*(other for other in self.keep_ckpt_ids if other != step), step]
            outdated, self.keep_ckpt_ids = kept[: -self.max_keep_ckpts], deque(kept[-self.max_keep_ckpts :])
            # the outdated ones too: resumed from here, a training deletes those that a kill now would leave
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            AtomicLocalBackend().put_text(self.last_ckpt, osp.join(runner.work_dir, 'last_checkpoint'))
            for step in outdated:
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)))

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
                self._remove(path)
        if not several:
            self.best_ckpt_path = best['']

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
