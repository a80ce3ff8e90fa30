"""How the tests start the tools in processes of their own, and what keeps a run on the demo's config small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mmdet
from conftest import ROOT

DEMO = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18-ce_fpn_8e_shapes.py'
MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim' / 'tools'
SMALL = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
for _split in ('val', 'test'):
    SMALL += [f'{_split}_dataloader.num_workers=0', f'{_split}_dataloader.persistent_workers=False']


def _command(tool: Path | str, arguments, options) -> list[str]:
    command = [tool] if str(tool).endswith('.sh') else [sys.executable, '-W', 'ignore', tool]
    return [*map(str, (*command, *arguments)), *(['--cfg-options', *options] if options else [])]


def _environment(env: dict[str, str]) -> dict[str, str]:
    return {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}', **env}


def run(tool: Path | str, *arguments, options=(), cwd, **env: str) -> subprocess.CompletedProcess:
    """Run a tool, Python or shell, in a folder, with options for its config and variables of the environment."""
    command = _command(tool, arguments, options)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=_environment(env))


def start(tool: Path | str, *arguments, options=(), cwd: Path, **env: str) -> tuple[subprocess.Popen, Path]:
    """Start a tool as ``run`` does; return the process and the file that has its output."""
    log = Path(cwd) / f'{Path(tool).name}.log'
    with open(log, 'w') as file:
        command = _command(tool, arguments, options)
        return subprocess.Popen(command, cwd=cwd, stdout=file, stderr=file, env=_environment(env)), log


def output(result: subprocess.CompletedProcess) -> str:
    """Return what a process printed, which has to have ended well."""
    text = result.stdout + result.stderr
    assert result.returncode == 0, text[-3000:]
    return text
