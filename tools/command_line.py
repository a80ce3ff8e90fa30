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
from mmengine.hub import get_config  # noqa: E402

from mmdet_ce.__main__ import find_configs  # noqa: E402
from mmdet_ce.compat import TORCH  # noqa: E402

# Without it torch.hub, which mmengine loads weights with, runs code in a file; torch < 2.6 reads no trainings with it
if TORCH >= (2, 6) and 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' not in os.environ:
    os.environ.setdefault('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')


def exit_on_problems(problems: list[str]) -> None:
    """Exit with a line for each problem, if there is one. Control characters, which files may hold, are escaped."""
    lines = [''.join(c if c.isprintable() else ascii(c)[1:-1] for c in f'error: {problem}') for problem in problems]
    if lines:
        sys.exit('\n'.join(lines))


def config_path(config: str) -> Path:
    """Return the path of a config: a file, or a name that ``python -m mmdet_ce configs`` lists."""
    paths = [Path(config), *find_configs(config)]
    return next(filter(os.path.isfile, paths), paths[0])  # no error for an option's long text


def read_config(config: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config, a path, a listed name or mmdet::FOLDER/NAME.py, and merge the options of the command line."""
    try:
        cfg = get_config(config) if '::' in config else Config.fromfile(config_path(config))
    except FileNotFoundError as error:  # of a base too
        exit_on_problems([f'config {config}: {error}; python -m mmdet_ce configs lists the shipped ones'])
    merge_options(cfg, options or {})
    return cfg


def merge_options(cfg: Config, options: dict[str, Any]) -> None:
    """Merge the options of the command line into a config; exit with a line for each that nothing reads."""
    exit_on_problems(option_problems(cfg, options))
    cfg.merge_from_dict(options)
