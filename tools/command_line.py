"""How the tools start, read configs and results, print, and end.

Imported before torch, which pyproject.toml's order of imports sees to: OpenMP reads its variables when torch loads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

# mmengine's own, at every start and in every worker; it says nothing about the user's run
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
os.environ.setdefault('PYTHONWARNINGS', 'ignore:pkg_resources is deprecated:UserWarning')
# An OpenMP thread that waits for its next task spins, for milliseconds. Where other processes want the cores too, that
# makes a step many times slower; spinning briefly costs nothing where they do not.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from rich.console import Console  # noqa: E402


def flush_denormals() -> None:
    """Compute with 0 in place of denormal numbers, like those of a gamma that decayed: a CPU is slow with them."""
    torch.set_flush_denormal(True)


def console() -> Console:
    """Return the console that tables are printed to: as wide as the terminal, else 120 columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def mean_and_spread(values: list[float], digits: int) -> str:
    """Return the mean of values with so many digits, and where there are several their standard deviation."""
    spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'


def exit_on_problems(problems: list[str]) -> None:
    """Exit with a line for each problem, if there is one."""
    if problems:
        sys.exit('\n'.join(f'error: {problem}' for problem in problems))


def make_folder(path: Path) -> None:
    """Make the folder that a tool writes to, unless it is there; exit with one line if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f'error: the output folder {path} cannot be made ({error.strerror}); name another with --out-dir')


@contextlib.contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Exit with the message of these errors alone, if one is raised in the block: they are for the user."""
    try:
        yield
    except errors as error:
        sys.exit(f'error: {error}')


def read_config(path: str | Path, options: Optional[dict[str, Any]] = None, owner: str = '') -> Config:
    """Read a config and merge the options of the command line; exit with one line if there is no such file.

    Args:
        path: The file.
        options: What to merge.
        owner: Named in that line, where there are several configs.
    """
    if not Path(path).is_file():
        sys.exit(f'error: config {path}{owner and f" of {owner}"} not found')
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options or {})
    return cfg


def read_metrics(work_dir: Path) -> dict[str, float]:
    """Return the COCO metrics of the newest test in ``work_dir``, or of the last validation of its newest training.

    Raises:
        ValueError: If there are none.
    """
    found = [*work_dir.glob('*/*.json'), *work_dir.glob('*/vis_data/scalars.json')]
    if not found:
        raise ValueError(f'no metrics in {work_dir}; the config must keep LocalVisBackend and LoggerHook')
    newest = max(found, key=lambda path: path.stat().st_mtime)
    records = [json.loads(line) for line in newest.read_text().splitlines()]
    metrics = [{key: value for key, value in record.items() if key.startswith('coco/')} for record in records]
    if not any(metrics):
        raise ValueError(f'{newest} has no COCO metric; the config must validate in its last epoch')
    return [record for record in metrics if record][-1]
