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


def run(tool: Path | str, *arguments, options=(), cwd, **env: str) -> subprocess.CompletedProcess:
    """Run a tool, Python or shell, in a folder, with options for its config and variables of the environment."""
    command = [tool] if str(tool).endswith('.sh') else [sys.executable, '-W', 'ignore', tool]
    command = [*map(str, (*command, *arguments)), *(['--cfg-options', *options] if options else [])]
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, 'PATH': path, **env})


def output(result: subprocess.CompletedProcess) -> str:
    """Return what a process printed, which has to have ended well."""
    text = result.stdout + result.stderr
    assert result.returncode == 0, text[-3000:]
    return text
