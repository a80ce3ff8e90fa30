"""Importing the package beside a framework that is too old, or an mmcv without operators: one clear error."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

import pytest
import setup_env

from mmdet_ce.environment import LEAST, TESTED, describe_versions

NO_OPERATORS = """
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv._ext':
            raise ModuleNotFoundError("No module named 'mmcv._ext'", name='mmcv._ext')
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    'setup, problem',
    [
        (NO_OPERATORS, 'mmcv with its compiled operators'),
        ('import torch; torch.__version__ = "2.0.1+cu118"', 'torch 2.1 or later, but found torch 2.0.1'),
    ],
)
def test_unusable_framework(setup, problem):
    code = f'import sys\n{setup}\nimport mmdet_ce'
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert result.returncode == 1, result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith(f'ImportError: mmdet_ce needs {problem}')


@pytest.mark.parametrize('name', [*TESTED])
def test_tested_versions_are_the_pins(name):
    env = setup_env.ENVIRONMENTS[name]
    assert TESTED[name]['python'] == '.'.join(map(str, env.python))
    for package in LEAST:
        assert env.pinned(package) == f'{package}=={TESTED[name][package]}'
        assert TESTED[name][package] in describe_versions()


def test_package_depends_on_nothing():
    assert all('extra ==' in requirement for requirement in requires('mmdet_ce') or [])
