"""Which checkpoint a training is resumed from: the one with the most progress, whatever the clocks say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Optional

from .files import CheckpointFileError, printable, read_checkpoint, whole_file

STEP = re.compile(r'(epoch|iter)_(\d{1,12})\.pth')


class Saved(NamedTuple):
    """A whole checkpoint of a training."""

    iterations: int
    path: Path
    run: str  # the experiment's name; another for every start of a training


def prepare_resume(work_dir: str | Path) -> Optional[str]:
    """Make ``last_checkpoint``, which mmengine resumes from, name the newest whole checkpoint of its training.

    A kill may leave it empty, or naming a file that is truncated, gone, or not the newest. The newest is the one with
    the most iterations among those that the same start of a training wrote as the named one. Where the named one is
    not whole, it is the one with the most iterations that is not ahead of it: an older, longer training may have left
    checkpoints in the folder.

    Args:
        work_dir: The work directory of the training; it need not exist.

    Returns:
        What ``last_checkpoint`` names now and why, if that was changed.

    Raises:
        CheckpointFileError: If there was a checkpoint and no whole one is left, or ``last_checkpoint`` is no file.
    """
    last = Path(work_dir).absolute() / 'last_checkpoint'
    text = _named(last)
    if '://' in text:
        return None
    named = Path(text).absolute() if text else None
    paths = sorted(
        {path for folder in {last.parent, named.parent if named else last.parent} for path in _steps(folder)}
    )
    if not (paths or named or last.exists()):
        return None
    problems: list[str] = []
    newest = _newest(named, paths, problems)
    reasons = '; '.join([f'last_checkpoint named {printable(text) or "none"}', *problems])
    if newest is None:
        raise CheckpointFileError(
            f'no whole checkpoint to resume from in {work_dir} ({reasons}); expected one that a training wrote, like '
            'epoch_12.pth; put one there, or train again without --resume'
        )
    if newest == named:
        return None
    with whole_file(last) as file:
        file.write(str(newest).encode())
    return f'resuming from {newest}, the newest whole checkpoint ({reasons})'


def read_training(path: str | Path) -> dict:
    """Read a checkpoint that a training can be resumed from.

    Raises:
        CheckpointFileError: As ``read_checkpoint``, and if the file does not say how far the training was.
    """
    checkpoint = read_checkpoint(path)
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if any(type((meta or {}).get(key)) is not int for key in ('epoch', 'iter')) or 'state_dict' not in checkpoint:
        raise CheckpointFileError(
            f'{printable(path)} is not a checkpoint of a training (no meta.epoch, meta.iter or state_dict); '
            'expected one that tools/train.py wrote, like epoch_12.pth; weights alone belong in load_from'
        )
    return checkpoint


def _newest(named: Optional[Path], paths: list[Path], problems: list[str]) -> Optional[Path]:
    """Return the checkpoint to resume from; add to ``problems`` what is wrong with others."""
    start = _read(named, problems) if named else None
    unit, count = _step(named) if named else (None, 0)
    if start is None and unit:
        behind = (_read(path, problems) for path in _descending(paths, unit) if _step(path)[1] < count)
        start = next(filter(None, behind), None)
    elif start is None:
        start = max(filter(None, (_read(path, problems) for path in paths if path != named)), default=None)
    if start is None:
        return None
    unit, count = _step(start.path)
    for path in _descending(paths, unit):
        if _step(path)[1] <= count:
            break
        ahead = _read(path, problems)
        if ahead and ahead.run == start.run and ahead.iterations > start.iterations:
            return ahead.path
    return start.path


def _read(path: Path, problems: list[str]) -> Optional[Saved]:
    try:
        meta = read_training(path)['meta']
    except CheckpointFileError as error:
        problems.append(str(error))
        return None
    return Saved(meta['iter'], path, str(meta.get('experiment_name')))


def _step(path: Path) -> tuple[Optional[str], int]:
    """Return what a file's name counts, 'epoch' or 'iter', and the count; None for another name."""
    match = STEP.fullmatch(path.name)
    return (match[1], int(match[2])) if match else (None, 0)


def _descending(paths: list[Path], unit: Optional[str]) -> list[Path]:
    return sorted((path for path in paths if _step(path)[0] == unit), key=_step, reverse=True)


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that a training has numbered."""
    try:
        return [path for path in folder.iterdir() if STEP.fullmatch(path.name) and path.is_file()]
    except OSError:  # it does not exist, or cannot: last_checkpoint may hold any text
        return []


def _named(last: Path) -> str:
    if not (last.exists() or last.is_symlink()):
        return ''
    if last.is_symlink() or not last.is_file():  # the file behind a link would be replaced
        raise CheckpointFileError(f'{last} is no file; expected a text file with the path of a checkpoint; remove it')
    return last.read_text(errors='replace').replace('\0', '').strip()
