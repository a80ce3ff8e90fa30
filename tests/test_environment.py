"""Importing the package beside a framework that is missing or too old or new: one clear error."""

from __future__ import annotations

import subprocess
import sys

import pytest
import setup_env

from mmdet_ce.environment import SUPPORTED, TESTED, describe_versions


def import_error(setup: str) -> str:
    """Import mmdet_ce in a fresh process after ``setup``; return the last line of its traceback."""
    code = f'import sys, importlib\n{setup}\nimport mmdet_ce'
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert result.returncode == 1, result.stdout
    return result.stderr.strip().splitlines()[-1]


def hide(name: str) -> str:
    """Make ``name`` look uninstalled to the import system."""
    return (
        'class Hide:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        f'        if name == {name!r}:\n'
        f'            raise ModuleNotFoundError("No module named {name}", name={name!r})\n'
        'sys.meta_path.insert(0, Hide())'
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'setup, problem',
    [
        (hide('torch'), 'torch is not installed'),
        (hide('mmdet'), 'mmdet is not installed'),
        (hide('mmcv._ext'), 'the installed mmcv has no compiled operators'),
        ('import mmdet; mmdet.__version__ = "2.28.2"', 'found mmdet 2.28.2'),
        ('import mmengine; mmengine.__version__ = "0.7.1"', 'found mmengine 0.7.1'),
        ('import mmcv; mmcv.__version__ = "2.2.0"', 'mmdet does not import: MMCV==2.2.0 is used but incompatible'),
    ],
)
def test_unusable_framework(setup, problem):
    message = import_error(setup)
    assert message.startswith('ImportError: mmdet_ce cannot be used: ' + problem)
    assert 'Supported: torch >=2.0,<3' in message and 'mmdet >=3.0,<4' in message and 'onedl-mmdetection' in message


@pytest.mark.parametrize('name', [*TESTED])
def test_tested_versions_are_the_pins(name):
    env = setup_env.ENVIRONMENTS[name]
    assert TESTED[name]['python'] == '.'.join(map(str, env.python))
    for package in SUPPORTED:
        assert env.pinned(package) == f'{package}=={TESTED[name][package]}'


@pytest.fixture(params=[*TESTED])
def tested(request, monkeypatch):
    """One of the tested sets of versions, as if it were installed."""
    tested = TESTED[request.param]
    for name in SUPPORTED:
        monkeypatch.setattr(f'{name}.__version__', f'{tested[name]}+local')
    monkeypatch.setattr('platform.python_version', lambda: f'{tested["python"]}.4')
    return tested


def test_tested_versions_are_named(tested):
    versions = [f'python {tested["python"]}.4', *(f'{name} {tested[name]}+local' for name in SUPPORTED)]
    assert describe_versions() == f'{", ".join(versions)}; tested together'


@pytest.mark.parametrize('tested', ['newest', 'oldest'], indirect=True)
def test_untested_versions_are_named(tested, monkeypatch):
    """Beside those of the nearest set."""
    monkeypatch.setattr('torch.__version__', '2.14.0')
    monkeypatch.setattr('platform.python_version', lambda: '3.12.1')
    assert describe_versions().endswith(
        f'; untested: python 3.12.1 (tested: {tested["python"]}), torch 2.14.0 (tested: {tested["torch"]})'
    )


def test_package_depends_on_nothing():
    from importlib.metadata import requires

    assert all('extra ==' in requirement for requirement in requires('mmdet_ce') or [])
