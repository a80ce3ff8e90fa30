"""Check that the installed framework is one that this package works with.

Nothing is installed as a dependency: that could replace a user's own build of mmcv, or a fork of mmdet.
"""

from __future__ import annotations

import importlib
import platform

from mmengine.utils import digit_version

# import name -> the oldest version that works
LEAST = {'torch': '2.1', 'mmengine': '0.10', 'mmcv': '2.0', 'mmdet': '3.0'}
# what the tests run with: the pins of requirements-common.txt and requirements.txt
TESTED = {
    'common': {'python': '3.8', 'torch': '2.1.2', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0'},
    'newest': {'python': '3.11', 'torch': '2.13.0', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0'},
}


def check_environment() -> None:
    """Compare the installed framework's versions with the supported ones.

    Raises:
        ImportError: If a part is too old, or mmcv has no compiled operators. A missing package
            raises Python's own error.
    """
    for name, least in LEAST.items():
        version = importlib.import_module(name).__version__
        if digit_version(version.partition('+')[0]) < digit_version(least):
            raise ImportError(f'mmdet_ce needs {name} {least} or later, found {name} {version}')
    try:
        importlib.import_module('mmcv.ops')
    except ModuleNotFoundError as error:
        raise ImportError(
            'mmdet_ce needs mmcv with its compiled operators; this one has none (mmcv-lite, or a build without them). '
            'The README says how to install it'
        ) from error


def describe_versions() -> str:
    """Return the versions in use, and those that the tests ran with, in one line."""
    found = {'python': platform.python_version(), **{name: importlib.import_module(name).__version__ for name in LEAST}}
    sets = ' or '.join(_joined(versions) for versions in reversed(TESTED.values()))
    return f'{_joined(found)} (tested with {sets})'


def _joined(versions: dict[str, str]) -> str:
    return ', '.join(f'{name} {version}' for name, version in versions.items())
