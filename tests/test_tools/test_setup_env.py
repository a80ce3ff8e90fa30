"""Set-up says in one line what the machine lacks, before anything is downloaded or written."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import setup_env
from conftest import ROOT
from utils import call


def test_missing_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    env = setup_env.Environment(sys.version_info[:2], ROOT / 'requirements.txt', tmp_path / 'venv')
    with pytest.raises(SystemExit, match=r"^setup: error: no C\+\+ compiler \('no-such-compiler' not found\)"):
        setup_env.set_up(env)
    assert not env.venv.exists()


def test_finished_setup_is_not_repeated(tmp_path, monkeypatch):
    pins = tmp_path / 'requirements.txt'
    pins.write_text('torch==1.0\n')
    env = setup_env.Environment((2, 7), pins, tmp_path)
    monkeypatch.setattr(setup_env, 'ENVIRONMENTS', {'newest': env})
    env.stamp.write_text(setup_env.fingerprint(env))
    assert call(setup_env.main) is None
    pins.write_text('torch==1.1\n')
    assert 'Python 2.7 is needed' in call(setup_env.main)


@pytest.mark.skipif(shutil.which('make') is None, reason='make is not installed')
def test_missing_python():
    command = ['make', 'setup', 'VERSIONS=newest', 'PYTHON=no-such-python']  # make test-common sets another
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Python 3.11 is needed and 'no-such-python' was not found" in result.stdout


@pytest.mark.parametrize('release, built_for', [('13.0', 'cu13.0-H200'), ('12.4', 'cpu')])
def test_operators_are_for_the_gpu_only_where_nvcc_can_build_them(release, built_for, tmp_path, monkeypatch, capsys):
    nvcc = tmp_path / 'nvcc'
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.88"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert setup_env.operators('13.0', 'H200') == built_for
    assert ('no nvcc of CUDA 13 on the path' in capsys.readouterr().out) == (built_for == 'cpu')
    nvcc.unlink()
    assert setup_env.operators('13.0', 'H200') == 'cpu'


@pytest.mark.parametrize('name', [*setup_env.ENVIRONMENTS])
def test_pins_keep_what_was_chosen(name):
    """Every version in a .in file is in the generated list, which names no place to download from."""
    env = setup_env.ENVIRONMENTS[name]
    pins = env.requirements.read_text()
    for line in env.requirements.with_suffix('.in').read_text().splitlines():
        if '==' in line:
            assert env.pinned(line.partition('==')[0]) == line
    assert 'http' not in pins and 'index' not in pins and 'opencv-python==' not in pins
