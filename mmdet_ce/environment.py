"""Check that the installed framework is one that this package works with.

Nothing is installed as a dependency: that could replace a user's own build of mmcv, or a fork of mmdet.
"""

from __future__ import annotations

import importlib
import platform
import re
from typing import Optional

# import name -> the oldest version that works
LEAST = {'torch': '2.1', 'mmengine': '0.10', 'mmcv': '2.0', 'mmdet': '3.0'}
# what the tests run with: the pins of requirements-common.txt and requirements.txt
TESTED = {
    'common': {'python': '3.8', 'torch': '2.1.2', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0'},
    'newest': {'python': '3.11', 'torch': '2.13.0', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0'},
}


def version_of(text: str) -> tuple[int, int]:
    """Return major and minor of a version: (2, 13) for '2.13.0+cpu'."""
    major, minor = re.findall(r'\d+', text)[:2]
    return int(major), int(minor)


def check_environment() -> None:
    """Import the framework and compare its versions with the supported ones.

    Raises:
        ImportError: If a part is missing, is too old or does not import, or if mmcv has no compiled operators. The
            message names each such part and the versions of the others.
    """
    problems = [problem for problem in map(_problem, LEAST) if problem]
    if not problems:
        problems = [problem for problem in [_problem_of_parts()] if problem]
    if problems:
        message = f'mmdet_ce needs {"; ".join(problems)}. Found: {_joined(_found())}. The README says how to install it'
        # With the package's name `python -m mmdet_ce` ends with this line alone, without a traceback.
        raise ImportError(message, name=__package__)


def _problem(name: str) -> Optional[str]:
    needed = f'{name} {LEAST[name]} or later'
    try:
        version = importlib.import_module(name).__version__
    except ModuleNotFoundError as error:
        if error.name == name:
            return f'{needed}, which is not installed'
        return f'{needed}, which does not import: {error}'
    except Exception as error:  # mmdet asserts versions of mmcv; a broken installation raises anything
        return f'{needed}, which does not import: {error}'
    return f'{needed}, but found {name} {version}' if version_of(version) < version_of(LEAST[name]) else None


def _problem_of_parts() -> Optional[str]:
    """Import what mmcv and mmdet load only where it is used."""
    try:
        importlib.import_module('mmcv.ops')
    except ModuleNotFoundError:
        return 'mmcv with its compiled operators, but this one has none (mmcv-lite, or a build without them)'
    except ImportError as error:
        return f'mmcv with operators that were compiled for the installed torch, but they do not load: {error}'
    try:
        importlib.import_module('mmdet.models')
    except ImportError as error:
        return f'mmdet.models, which does not import: {error}'
    return None


def _found() -> dict[str, str]:
    """Return the versions of Python and of the parts that import."""
    found = {'python': platform.python_version()}
    for name in LEAST:
        try:
            found[name] = importlib.import_module(name).__version__
        except Exception:  # reported as a problem
            continue
    return found


def describe_versions() -> str:
    """Return the versions in use, and those that the tests ran with, in one line."""
    sets = ' or '.join(_joined(versions) for versions in reversed(TESTED.values()))
    return f'{_joined(_found())} (tested with {sets})'


def _joined(versions: dict[str, str]) -> str:
    return ', '.join(f'{name} {version}' for name, version in versions.items())
