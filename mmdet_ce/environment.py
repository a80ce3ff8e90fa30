"""Check that the installed framework is one that this package works with.

Nothing is installed as a dependency, since that could replace a user's own build of mmcv or a fork of mmdet. What
counts is what ``import mmdet`` finds: OpenMMLab's distributions and import-compatible forks are treated alike.
"""

from __future__ import annotations

import importlib
import platform
import re
from types import ModuleType

# import name -> (oldest version that works, first version that does not)
SUPPORTED = {
    'torch': ('2.1', '3'),
    'mmengine': ('0.8', '2'),
    'mmcv': ('2.0', '3'),
    'mmdet': ('3.0', '4'),
}
# what the tests run with: the pins of requirements-common.txt and requirements.txt
TESTED = {
    'common': {'python': '3.8', 'torch': '2.1.2', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0'},
    'newest': {'python': '3.11', 'torch': '2.13.0', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0'},
}


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, () if it has none."""
    match = re.match(r'v?(\d+(?:\.\d+)*)', version)
    return tuple(int(part) for part in match[1].split('.')) if match else ()


def _import(name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
        if name == 'mmcv':
            importlib.import_module('mmcv.ops')
        return module
    except ModuleNotFoundError as error:
        if error.name == name:
            problem = f'{name} is not installed'
        elif error.name == 'mmcv._ext':
            problem = 'the installed mmcv has no compiled operators (a lite or failed build)'
        else:
            problem = f'{name} does not import: {error}'
    except Exception as error:  # mmdet asserts the version of mmcv, a broken mmcv._ext raises ImportError or OSError
        problem = f'{name} does not import: {error}'
    raise ImportError(_message(problem)) from None


def _message(problem: str) -> str:
    supported = ', '.join(f'{name} >={low},<{high}' for name, (low, high) in SUPPORTED.items())
    tested = '; '.join(', '.join(f'{name} {version}' for name, version in one.items()) for one in TESTED.values())
    return (
        f'mmdet_ce cannot be used: {problem}. Supported: {supported}, from OpenMMLab or an import-compatible fork '
        f"(onedl-mmdetection and its siblings); tested: {tested}. The package's README says how to install them."
    )


def check_environment() -> None:
    """Import the framework and compare its versions with the supported ones.

    Raises:
        ImportError: If a part is missing, does not import, or has an unsupported version; the message names what was
            found and what is supported.
    """
    for name, (low, high) in SUPPORTED.items():
        version = str(getattr(_import(name), '__version__', 'of unknown version'))
        if not _numbers(low) <= _numbers(version) < _numbers(high):
            raise ImportError(_message(f'found {name} {version}'))


def describe_versions() -> str:
    """Return the versions in use in one line, and which of them no test ran with, beside the nearest that one did."""
    found = {'python': platform.python_version()}
    found.update((name, str(_import(name).__version__)) for name in SUPPORTED)
    versions = ', '.join(f'{name} {version}' for name, version in found.items())
    untested = min((_differences(found, tested) for tested in reversed(list(TESTED.values()))), key=len)
    return f'{versions}; ' + (f'untested: {", ".join(untested)}' if untested else 'tested together')


def _differences(found: dict[str, str], tested: dict[str, str]) -> list[str]:
    return [
        f'{name} {version} (tested: {tested[name]})'
        for name, version in found.items()
        if _numbers(version)[: len(_numbers(tested[name]))] != _numbers(tested[name])
    ]
