"""Which checkpoint a training is resumed from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Optional

from .checkpoint_io import CheckpointFileError, find_damage, read_checkpoint, whole_file


def prepare_resume(work_dir: str | Path) -> Optional[str]:
    """Make ``last_checkpoint``, which mmengine resumes from, name the newest whole checkpoint of a training.

    A kill may leave it empty, or naming a file that is truncated, gone, or not the newest. A ``last_checkpoint`` newer
    than all checkpoints is right if the one it names is whole.

    Args:
        work_dir: The work directory of the training; it need not exist.

    Returns:
        What ``last_checkpoint`` names now and why, if that was changed.

    Raises:
        CheckpointFileError: If there was a checkpoint, and no whole one is left.
    """
    last = Path(work_dir).absolute() / 'last_checkpoint'
    named = last.read_text(errors='replace').strip() if last.is_file() else ''
    if '://' in named:
        return None
    folders = {last.parent, Path(named).absolute().parent if named else last.parent}
    paths = {
        path
        for folder in folders
        for path in folder.glob('*_*.pth')
        if re.fullmatch(r'(epoch|iter)_\d+', path.stem) and path.is_file()
    }
    if named:
        if not _problem(Path(named)) and all(p.stat().st_mtime_ns <= last.stat().st_mtime_ns for p in paths):
            return None
        paths.add(Path(named).absolute())
    if not paths and not last.exists():
        return None

    saved, passed_over = {}, []
    for path in sorted(paths):
        problem = _problem(path)
        if not problem:
            try:
                meta = read_checkpoint(path)['meta']
                saved[path] = str(meta['time']), int(meta['iter']), path == Path(named).absolute()
                continue
            except (CheckpointFileError, KeyError, TypeError, ValueError):
                problem = 'is not a checkpoint of a training'
        passed_over.append(f'{path.name} {problem}')
    reasons = '; '.join([f'last_checkpoint named {named or "none"}', *passed_over])
    if not saved:
        raise CheckpointFileError(
            f'no whole checkpoint to resume from in {work_dir} ({reasons}); expected one that a training wrote, like '
            'epoch_12.pth; put one there, or train again without --resume'
        )
    newest = max(saved, key=saved.get)
    with whole_file(last) as file:
        file.write(str(newest).encode())
    return f'resuming from {newest}, the newest whole checkpoint ({reasons})'


def _problem(path: Path) -> Optional[str]:
    return find_damage(path) if path.is_file() else 'is missing'
