"""The shell scripts: what those of Slurm ask srun for (a job of it needs a cluster); a signal reaches what they run."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from conftest import ROOT
from utils import is_running, wait_until


def call(tool, *arguments, folder, **env):
    srun = folder / 'srun'
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    env = {**os.environ, 'PATH': f'{folder}{os.pathsep}{os.environ["PATH"]}', **env}
    return subprocess.run([ROOT / 'tools' / tool, *arguments], capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    'tool, third, rest',
    [
        ('slurm_train.sh', ['--work-dir', 'some where'], ['--resume']),
        ('slurm_test.sh', ['some where'], ['--out', 'a b']),
    ],
)
def test_asks_for_tasks_and_passes_arguments_on(tool, third, rest, tmp_path):
    env = dict(GPUS='16', SRUN_ARGS='--time=1:00 --exclusive')
    result = call(tool, 'gpu', 'my job', 'c.py', 'some where', *rest, folder=tmp_path, **env)
    lines = result.stdout.splitlines()
    python = lines.index('python')
    assert {'--partition=gpu', '--job-name=my job', '--gres=gpu:8', '--ntasks=16', '--ntasks-per-node=8'} <= set(
        lines[:python]
    )
    assert lines[python - 2 : python] == ['--time=1:00', '--exclusive']
    script = ROOT / 'tools' / tool.replace('slurm_', '').replace('.sh', '.py')
    assert lines[python:] == ['python', '-u', str(script), 'c.py', *third, '--launcher', 'slurm', *rest]


def test_fewer_gpus_than_a_node_has(tmp_path):
    lines = call('slurm_test.sh', 'p', 'j', 'c.py', 'a.pth', folder=tmp_path, GPUS='2').stdout.splitlines()
    assert '--gres=gpu:2' in lines and '--ntasks-per-node=2' in lines


@pytest.mark.parametrize('tool', ['slurm_train.sh', 'slurm_test.sh'])
def test_usage(tool, tmp_path):
    result = call(tool, 'p', 'j', 'c.py', folder=tmp_path)
    assert result.returncode and ': usage: ' in result.stderr and not result.stdout


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads the state of processes from /proc')
@pytest.mark.parametrize('tool', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_what_a_script_runs_ends_with_it(number, tool, tmp_path):
    """A program in the place of python and srun: it is what gets the signal."""
    for name in ('python', 'srun'):
        (tmp_path / name).write_text(f'#!/bin/sh\necho $$ > {tmp_path}/started\nexec sleep 600\n')
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, 'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'}
    process = subprocess.Popen([ROOT / 'tools' / tool, 'c.py', '2', '2', '2'], env=env)
    started = tmp_path / 'started'
    assert wait_until(lambda: started.is_file() and started.read_text().strip())
    process.send_signal(number)
    assert process.wait(20) == -number
    assert not is_running(int(started.read_text()))
