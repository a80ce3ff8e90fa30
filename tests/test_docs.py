"""The page that explains CE quotes lines of the code: each must be there."""

from __future__ import annotations

import re

from conftest import ROOT

PAGE = ROOT / 'docs' / 'channel_equilibrium.md'


def test_every_quoted_line_is_in_the_code():
    quotes = re.findall(r'^    (\S.*?)\s+# (mmdet_ce/\S+\.py)$', PAGE.read_text(), flags=re.M)
    assert len(quotes) >= 14
    lines = {file: [line.strip() for line in (ROOT / file).read_text().splitlines()] for _, file in quotes}
    missing = [q for q, file in quotes if not any(line.startswith(q) for line in lines[file])]
    assert not missing


def test_the_page_is_short_and_its_links_lead_somewhere():
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 150
    for link in re.findall(r'\]\((?!http)([^)#]+)\)', text):
        assert (PAGE.parent / link).exists(), link
