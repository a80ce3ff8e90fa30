"""Importing the package beside a framework that is too old, or an mmcv without operators: one clear error."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

import pytest
from conftest import ROOT

from mmdet_ce.environment import LEAST, TESTED, describe_versions

HIDE = """
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == '{name}':
            raise ModuleNotFoundError("No module named '{name}'", name='{name}')
sys.meta_path.insert(0, Hide())
"""
PROBLEMS = [
    (HIDE.format(name='mmcv._ext'), 'mmcv with its compiled operators, but this one has none'),
    ('import torch; torch.__version__ = "2.0.1+cu118"', 'torch 2.1 or later, but found torch 2.0.1'),
    ('import mmcv; mmcv.__version__ = "2.2.0"', 'mmdet 3.0 or later, which does not import: MMCV==2.2.0 is used'),
    (HIDE.format(name='mmdet'), 'mmdet 3.0 or later, which is not installed. Found: python 3.'),
    (HIDE.format(name='pycocotools'), "mmdet.models, which does not import: No module named 'pycocotools'"),
]


@pytest.mark.slow
@pytest.mark.parametrize('setup, problem', PROBLEMS, ids=[problem for _, problem in PROBLEMS])
def test_unusable_framework(setup, problem):
    """python -m mmdet_ce env is one line without a traceback."""
    code = f"import runpy, sys\n{setup}\nsys.argv[1:] = ['env']\nrunpy._run_module_as_main('mmdet_ce')"
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert result.returncode == 1, result.stdout
    line = result.stderr.strip().splitlines()[-1]
    assert 'Traceback' not in result.stderr
    assert f'(ImportError: mmdet_ce needs {problem}' in line


@pytest.mark.parametrize('name, file', [('newest', 'requirements'), ('common', 'requirements-common')])
def test_tested_versions_are_the_pins(name, file):
    pins = (ROOT / f'{file}.txt').read_text().splitlines()
    assert f'{TESTED[name]["python"]}:{file}' in (ROOT / 'Makefile').read_text().replace(';', ' ').split()
    for package in LEAST:
        assert f'{package}=={TESTED[name][package]}' in pins
        assert TESTED[name][package] in describe_versions()


def test_package_depends_on_nothing():
    assert all('extra ==' in requirement for requirement in requires('mmdet_ce') or [])
