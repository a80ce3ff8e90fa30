"""The documents against the code: the files, links and arguments that they name exist; the configs in them work."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config

import mmdet_ce

PAGES = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'configs/ce/README.md')),
    *sorted((ROOT / 'docs').glob('*.md')),
]
README, USAGE, YOUR_DATA = (ROOT / name for name in ('README.md', 'docs/usage.md', 'docs/your_data.md'))

every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get on GitHub."""
    headings = re.findall(r'^#+ (.+)$', page.read_text(), flags=re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def argument_tables(page: Path) -> dict[str, dict[str, str]]:
    """Return for each class the arguments and defaults in the tables headed 'argument of `CLASS`'."""
    tables = {}
    for name, rows in re.findall(r'^\| argument of `(\w+)` .*\n\|[ -|]+\n((?:\|.*\n)+)', page.read_text(), flags=re.M):
        cells = [[cell.strip() for cell in row.split('|')[1:3]] for row in rows.splitlines()]
        tables[name] = {argument.strip('`'): default.strip('`') for argument, default in cells}
    return tables


def own_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class that it does not take from mmdet, those of ``*args`` and the like aside."""
    parameters = inspect.signature(cls.__init__).parameters
    keywords = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    return keywords or {name: p for name, p in parameters.items() if name not in ('self', 'in_channels')}


@every_page
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r'\]\((?!https?:)([^)]+)\)', page.read_text()):
        name, _, anchor = target.partition('#')
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@every_page
def test_files_that_are_named_exist(page):
    named = re.findall(r'(?<![\w./$}-])((?:mmdet_ce|tools|tests|configs|docs|\.ci)/[\w./-]*[\w/])', page.read_text())
    starts = set(re.findall(r'^C=(\S+)', page.read_text(), flags=re.M))  # of config names in a variable
    missing = [name for name in named if not (ROOT / name).exists() and name not in starts]
    assert not missing


@pytest.mark.parametrize('name', ['CEResNet', 'ChannelEquilibrium'])
def test_every_argument_is_in_the_usage_page(name):
    documented, parameters = argument_tables(USAGE)[name], own_parameters(getattr(mmdet_ce, name))
    assert set(documented) == set(parameters)
    for argument, default in documented.items():
        if default != 'first three stages':  # None stands for it
            assert eval(default) == parameters[argument].default, argument


def test_the_config_in_the_readme_works():
    (block,) = (block for block in blocks(README, 'python') if '_base_' in block)
    cfg = Config.fromstring(block, '.py')
    assert type(MODELS.build({**cfg.model.backbone, 'init_cfg': None})) is mmdet_ce.CEResNet


def test_the_other_backbone_of_the_page_trains():
    (block,) = (block for block in blocks(YOUR_DATA, 'python') if 'CECSPNeXt' in block)
    exec(block, {})
    backbone = MODELS.build(dict(type='CECSPNeXt', widen_factor=0.25, deepen_factor=0.167))
    sum(out.mean() for out in backbone(torch.randn(2, 3, 64, 64))).backward()
    layers = [module for module in backbone.modules() if isinstance(module, mmdet_ce.ChannelEquilibrium)]
    assert len(layers) == 4 and all(layer.theta.grad for layer in layers)
