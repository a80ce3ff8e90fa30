"""How a training and a test are started: by tools/train.py alone, by torch's launcher, or by Slurm."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple, Optional

from child_process import TOOLS, tool_command


class Launch(NamedTuple):
    """The launcher and the processes that it starts.

    Args:
        kind: 'none' (one process, tools/train.py), 'pytorch' (tools/dist_train.sh) or 'slurm' (tools/slurm_train.sh).
        gpus: Processes, each with a GPU of its own. 0 is one process on the CPU; None leaves the device to mmengine.
        partition: Slurm's partition.
    """

    kind: str = 'none'
    gpus: Optional[int] = None
    partition: str = ''

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.gpus or 1

    def train(self, config: str, work_dir: Path, options: list[str]) -> list[str]:
        """Return the command line of a training."""
        tail = ['--cfg-options', *options]
        if self.kind == 'slurm':
            return self._script('slurm_train.sh', self.partition, work_dir.parent.name, config, work_dir, *tail)
        if self.kind == 'pytorch':
            return self._script('dist_train.sh', config, self.processes, '--work-dir', work_dir, *tail)
        return tool_command('train.py', config, '--work-dir', work_dir, *tail)

    def test(self, config: str, checkpoint: Path, work_dir: Path, options: list[str]) -> list[str]:
        """Return the command line of a test."""
        tail = ['--work-dir', work_dir, '--cfg-options', *options]
        if self.kind == 'slurm':
            return self._script('slurm_test.sh', self.partition, work_dir.parent.name, config, checkpoint, *tail)
        if self.kind == 'pytorch':
            return self._script('dist_test.sh', config, checkpoint, self.processes, *tail)
        return tool_command('test.py', config, checkpoint, *tail)

    def environment(self) -> dict[str, str]:
        """Return the variables of the started processes: the scripts call ``python``, which is to be this one."""
        path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}'
        own = {'PATH': path, 'GPUS': str(self.processes)} if self.kind != 'none' else {}
        if self.gpus == 0:
            own['CUDA_VISIBLE_DEVICES'] = ''
        return {**os.environ, **own}

    @staticmethod
    def _script(name: str, *arguments: object) -> list[str]:
        return [str(TOOLS / name), *map(str, arguments)]
