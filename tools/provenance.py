"""Where a result comes from: commit, versions, command, date, hardware."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mmdet_ce import __version__
from mmdet_ce.environment import describe_versions

ROOT = Path(__file__).resolve().parent.parent


def provenance() -> dict[str, Any]:
    """Return commit, whether files differed from it, versions, command and date of this process."""
    return dict(
        commit=_git('rev-parse', 'HEAD') or 'unknown',
        uncommitted_changes=bool(_git('status', '--porcelain', '--untracked-files=no')),
        versions=f'mmdet_ce {__version__}, {describe_versions()}',
        command=shlex.join(sys.argv),
        date=datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
    )


def hardware(log: Path) -> str:
    """Name the GPUs that mmengine wrote into a training's log, else this machine's processor."""
    text = log.read_text(errors='replace') if log.is_file() else ''
    gpus = re.findall(r'^ +(GPU [\d,]+): (.+)$', text, flags=re.M)
    if gpus:
        return ', '.join(f'{numbers}: {name}' for numbers, name in dict(gpus).items())
    return f'CPU: {processor()}, {os.cpu_count()} cores'


def processor() -> str:
    """Name this machine's processor."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(['git', '-C', str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:  # no git
        return ''
    return result.stdout.strip()
