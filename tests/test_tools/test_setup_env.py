"""Set-up says in one line what the machine lacks, before anything is downloaded or written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import setup_env
from conftest import ROOT


@pytest.fixture
def clone(tmp_path):
    """The files that set-up reads, without an environment."""
    for name in ('setup.py', 'pyproject.toml', 'requirements.txt', 'Makefile', 'tools/setup_env.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(clone, *command, **env):
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, env=env)


def set_up(clone, **env):
    """Set up the newest environment, as if that were for this Python."""
    code = (
        'import sys; sys.path.insert(0, "tools"); import setup_env as s;'
        's.ENVIRONMENTS["newest"] = s.ENVIRONMENTS["newest"]._replace(python=sys.version_info[:2]); s.main()'
    )
    return run(clone, sys.executable, '-c', code, **env)


def test_missing_compiler(clone):
    result = set_up(clone, CXX='no-such-compiler')
    assert result.returncode == 1
    assert result.stderr.startswith("setup: error: no C++ compiler ('no-such-compiler' not found)")
    assert len(result.stderr.splitlines()) == 1 and not (clone / '.venv').exists()


@pytest.mark.skipif(shutil.which('make') is None, reason='make is not installed')
def test_missing_python(clone):
    result = run(clone, 'make', 'test', 'VERSIONS=newest', 'PYTHON=no-such-python')  # make test-common sets another
    assert result.returncode == 2
    assert "Python 3.11 is needed and 'no-such-python' was not found" in result.stdout
    assert not (clone / '.venv').exists()


def test_finished_setup_is_not_repeated(clone):
    code = (
        'import sys; sys.path.insert(0, "tools"); import setup_env as s; env = s.ENVIRONMENTS["newest"];'
        'env.venv.mkdir(); env.stamp.write_text(s.fingerprint(env)); s.check_machine = None; s.main()'
    )
    assert run(clone, sys.executable, '-c', code).returncode == 0
    (clone / 'requirements.txt').write_text('torch==1.0\n')
    result = set_up(clone, CXX='no-such-compiler')
    assert result.returncode == 1, 'changed pins ask for a new set-up'


@pytest.mark.parametrize('name', [*setup_env.ENVIRONMENTS])
def test_pins_keep_what_was_chosen(name):
    """Every version in a .in file is in the generated list, which names no place to download from."""
    env = setup_env.ENVIRONMENTS[name]
    pins = env.requirements.read_text()
    chosen = env.requirements.with_suffix('.in').read_text().splitlines()
    for line in chosen:
        if '==' in line:
            assert env.pinned(line.partition('==')[0]) == line
    assert 'http' not in pins and 'index' not in pins and 'opencv-python==' not in pins
