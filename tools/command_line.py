"""How the tools start, read configs, and end. Imported before torch: OpenMP reads its variables when torch loads it."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

# mmengine's, at every start of a worker too; and numpy's about denormal numbers, which are switched off below
warnings.filterwarnings('ignore', message='pkg_resources is deprecated|The value of the smallest subnormal')
os.environ.setdefault('PYTHONWARNINGS', 'ignore:pkg_resources is deprecated:UserWarning')
# OpenMP's waiting threads spin: for long, a step is many times slower where other processes want the cores too
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402

# Without it torch.hub, which mmengine loads weights with, runs code in a file; torch < 2.6 reads no trainings with it
if tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6) and 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' not in os.environ:
    os.environ.setdefault('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
torch.set_flush_denormal(True)  # a CPU is slow with denormal numbers, like those of a gamma that decayed


def exit_on_problems(problems: list[str]) -> None:
    """Exit with a line for each problem, if there is one. Control characters, which files may hold, are escaped."""
    lines = [''.join(c if c.isprintable() else ascii(c)[1:-1] for c in f'error: {problem}') for problem in problems]
    if lines:
        sys.exit('\n'.join(lines))


def read_config(path: str | Path, options: dict | None = None) -> Config:
    """Read a config and merge the options of the command line; exit with one line if there is no such file."""
    if not Path(path).is_file():
        exit_on_problems([f'config {path} not found; python -m mmdet_ce configs lists the shipped ones'])
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options or {})
    return cfg
