"""Fixtures of the whole suite."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmdet.utils import register_all_modules
from released import FOLDER

from mmdet_ce.environment import describe_versions

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'

# A shell ignores Ctrl-C in what it runs in the background, and every child inherits that; tests of Ctrl-C would hang.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Name the versions that the tests run with, in CI's log too."""
    return describe_versions()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first: else one process ends with them, and the others wait."""
    items.sort(key=lambda item: item.get_closest_marker('slow') is None)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)  # a tool that ran in this process set it


@pytest.fixture(scope='session', autouse=True)
def _mmdet_scope() -> None:
    register_all_modules(init_default_scope=True)


@pytest.fixture(scope='session')
def golden() -> Path:
    """The folder of values computed by the released code."""
    return FOLDER


@pytest.fixture(scope='session')
def coco_tiny() -> Path:
    """A small real COCO subset; not part of the repository."""
    folder = SHARED / 'coco_tiny'
    if not folder.is_dir():
        pytest.skip(f'COCO subset not found at {folder}')
    return folder
