"""Set-up says in one line what the machine lacks, before anything is downloaded or written."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import setup_env
from conftest import ROOT
from utils import call


def test_missing_compiler(monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    message = call(setup_env.check_machine)
    assert message.startswith("setup: error: no C++ compiler ('no-such-compiler' not found)")
    monkeypatch.setattr(sys, 'prefix', sys.base_prefix)
    assert 'belongs to no environment' in call(setup_env.check_machine)


def test_finished_setup_is_not_repeated(tmp_path, monkeypatch):
    pins = tmp_path / 'requirements.txt'
    pins.write_text('torch==1.0\n')
    monkeypatch.setattr(setup_env, 'STAMP', tmp_path / 'stamp')
    setup_env.STAMP.write_text(setup_env.fingerprint(pins))
    monkeypatch.setenv('CXX', 'no-such-compiler')
    assert call(setup_env.main, pins) is None
    for version in ('1.1', '1.0'):  # of which the first was not finished
        pins.write_text(f'torch=={version}\n')
        assert 'no C++ compiler' in call(setup_env.main, pins)


@pytest.mark.skipif(shutil.which('make') is None, reason='make is not installed')
@pytest.mark.parametrize(
    'argument, message',
    [
        ('PYTHON=no-such-python', "Python 3.11 is needed, and 'no-such-python' is none"),
        ('PYTHON=true', "Python 3.11 is needed, and 'true' is none"),
        ('VERSIONS=old', 'VERSIONS=old has no requirements-old.txt'),
    ],
)
def test_missing_python_or_pins(argument, message):
    command = ['make', 'setup', 'VERSIONS=newest', argument]  # make test-common sets another
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stdout + result.stderr


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


@pytest.mark.parametrize('name', ['requirements', 'requirements-common'])
def test_pins_keep_what_was_chosen(name):
    """Every version in a .in file is in the generated list, which names no place to download from."""
    pins = (ROOT / f'{name}.txt').read_text()
    for line in (ROOT / f'{name}.in').read_text().splitlines():
        assert '==' not in line or line in pins.splitlines()
    assert 'http' not in pins and 'index' not in pins and 'opencv-python==' not in pins
