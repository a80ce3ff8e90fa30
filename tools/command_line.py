"""How the tools start, read configs, and end. Imported before torch: OpenMP reads its variables when torch loads it."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

# mmengine's, at every start of a worker too
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
os.environ.setdefault('PYTHONWARNINGS', 'ignore:pkg_resources is deprecated:UserWarning')
# OpenMP's waiting threads spin: for long, a step is many times slower where other processes want the cores too
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')

from checks import option_problems  # noqa: E402
from mmengine.config import Config  # noqa: E402

from mmdet_ce.compat import TORCH  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'

# Without it torch.hub, which mmengine loads weights with, runs code in a file; torch < 2.6 reads no trainings with it
if TORCH >= (2, 6) and 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' not in os.environ:
    os.environ.setdefault('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')


def exit_on_problems(problems: list[str]) -> None:
    """Exit with a line for each problem, if there is one. Control characters, which files may hold, are escaped."""
    lines = [''.join(c if c.isprintable() else ascii(c)[1:-1] for c in f'error: {problem}') for problem in problems]
    if lines:
        sys.exit('\n'.join(lines))


def config_path(config: str | Path) -> Path:
    """Return the path of a config: a file, or a name that ``python -m mmdet_ce configs`` lists."""
    if Path(config).is_file():
        return Path(config)
    listed = (path for path in CONFIGS.glob('*/*.py') if path.match(f'{config}.py'))
    return next(listed, Path(config))


def read_config(config: str | Path, options: dict[str, Any] | None = None) -> Config:
    """Read a config and merge the options of the command line; exit with one line if there is no such file."""
    path = config_path(config)
    if not path.is_file():
        exit_on_problems([f'config {path} not found; python -m mmdet_ce configs lists the shipped ones'])
    cfg = Config.fromfile(path)
    exit_on_problems(option_problems(cfg, options or {}))
    cfg.merge_from_dict(options or {})
    return cfg
