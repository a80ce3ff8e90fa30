"""What the command for COCO writes into the documents, and what it does not."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Optional

import benchmark_coco
import pytest
import yaml
from coco import publish as publishing
from coco.results import ap_beside_plain, read_results
from coco.rows import all_rows
from conftest import ROOT
from utils import call

ROW, PLAIN = 'retinanet_r18-ce-identity_fpn_1x_coco', 'retinanet_r18_fpn_1x_coco'
DOCUMENTS = (publishing.TABLES, publishing.METAFILE, publishing.README)
main = partial(call, benchmark_coco.main)


def entry(box: float, mask: Optional[float] = None) -> dict:
    """A result as the tool records it."""
    metrics = {'coco/bbox_mAP': box, **({} if mask is None else {'coco/segm_mAP': mask})}
    start = dict(commit='c0ffee' * 6, uncommitted_changes=True, versions='v 1', command='tool --gpus 8', date='today')
    return dict(metrics=metrics, trial=[], hardware='GPU 0: H', starts=[start])


def results_file(folder: Path, **results: dict) -> Path:
    path = folder / 'results.json'
    path.write_text(json.dumps(dict(results=results)))
    return path


@pytest.fixture
def published(tmp_path):
    """A folder of results, of a row with two seeds and one without its plain counterpart; and a folder for copies."""
    results = {
        'mask-rcnn_r50-ce_fpn_1x_coco': {'0': entry(0.391, 0.352), '1': entry(0.393, 0.354)},
        'mask-rcnn_r50_fpn_1x_coco': {'0': entry(0.382, 0.347)},
        'retinanet_r18-ce-identity_fpn_1x_coco': {'0': entry(0.32)},
    }
    results_file(tmp_path, **results)
    return tmp_path, tmp_path / 'copy'


def test_publish_writes_the_three_documents_the_same_each_time(published, capsys):
    folder, copy = published
    assert main('--publish', '--out-dir', folder, '--into', copy) is None
    tables, metafile, readme = ((copy / name).read_text() for name in DOCUMENTS)
    cells = dict(re.findall(r'^\| \[`(\S+)`\].*\| ([^|]*) \|$', tables, flags=re.M))
    assert sorted(cells) == all_rows()
    assert cells.pop('mask-rcnn_r50-ce_fpn_1x_coco') == '39.2 ± 0.1 / 35.3 ± 0.1 (plain 38.2 / 34.7)'
    assert cells.pop(ROW) == '32.0 (plain not run)'
    other = 'mask-rcnn_r50-ce-identity_fpn_1x_coco'  # shares the plain counterpart, was not trained itself
    assert cells.pop(other) == 'not run' and set(cells.values()) == {'not run'}
    assert '| 39.2 ± 0.1 / 35.3 ± 0.1 (plain 38.2 / 34.7) | 32.0 (plain not run) |' in readme

    origin = 'today, GPU 0: H, v 1, commit c0ffeec0f with uncommitted changes: `tool --gpus 8`'
    assert f'- `mask-rcnn_r50-ce_fpn_1x_coco`: seed 0, 1: {origin}\n' in tables
    assert f'- `mask-rcnn_r50_fpn_1x_coco`: seed 0: {origin}\n' in tables

    models = {model['Name']: model for model in yaml.safe_load(metafile)['Models']}
    assert sorted(models) == all_rows() and sum('Results' in model for model in models.values()) == 2
    box, mask = models['mask-rcnn_r50-ce_fpn_1x_coco']['Results']
    assert box == dict(Task='Object Detection', Dataset='COCO', Metrics={'box AP': 39.2})
    assert mask == dict(Task='Instance Segmentation', Dataset='COCO', Metrics={'mask AP': 35.3})
    assert len(readme.splitlines()) <= 150 and 'COCO AP: not run' not in readme

    assert main('--publish', '--out-dir', folder, '--into', copy) is None
    assert [(copy / name).read_text() for name in DOCUMENTS] == [tables, metafile, readme]

    publishing.publish({}, copy)  # nothing of what was published stays
    tables, metafile, readme = ((copy / name).read_text() for name in DOCUMENTS)
    assert 'COCO AP: not run.\n\n' in tables and 'COCO AP: not run.\n\n' in readme
    assert all('Results' not in model for model in yaml.safe_load(metafile)['Models'])
    assert '39.2' not in tables + metafile + readme and tables.count('| not run |') == len(all_rows())


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of the repository's documents in the place of the repository's."""
    for name in DOCUMENTS:
        (tmp_path / 'repository' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / 'repository' / name)
    monkeypatch.setattr(publishing, 'ROOT', tmp_path / 'repository')
    return tmp_path / 'repository'


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('into', [[], ['--into', 'repository']])
@pytest.mark.parametrize('name', [ROW, PLAIN])
def test_a_trial_is_published_into_copies_alone_and_says_so(into, name, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = {key: {'0': entry(0.3, 0.2)} for key in (ROW, PLAIN)}
    results[name]['0']['trial'] = ['a subset of COCO']
    path, before = results_file(tmp_path, **results), contents(repository)
    message = main('--publish', '--out-dir', tmp_path, *into)
    assert re.fullmatch(f'error: the results of {ROW} are a trial \\(a subset of COCO\\)[^\n]+', message)
    assert contents(repository) == before

    assert ap_beside_plain(read_results(path), ROW) == '30.0 / 20.0 (plain 30.0 / 20.0) - a trial, not COCO'
    assert main('--publish', '--out-dir', tmp_path, '--into', tmp_path / 'copy') is None
    for name in (publishing.TABLES, publishing.README):
        lines = [line for line in (tmp_path / 'copy' / name).read_text().splitlines() if '30.0' in line]
        assert lines and all('a trial, not COCO' in line for line in lines)
    models = yaml.safe_load((tmp_path / 'copy' / publishing.METAFILE).read_text())['Models']
    found = [result['Dataset'] for model in models for result in model.get('Results', [])]
    assert found == ['a trial, not COCO'] * 2


def test_what_is_no_trial_goes_into_the_repository(repository, published):
    assert main('--publish', '--out-dir', published[0]) is None
    assert all('39.2' in content.decode() for content in contents(repository).values())


@pytest.mark.parametrize(
    'document, old, new, message',
    [
        (publishing.README, '<!-- COCO AP', '<!-- AP', 'README.md has 0 marks'),
        (publishing.TABLES, f'[`{ROW}`]', '[`r`]', f'has 0 table rows for {ROW}'),
        (publishing.METAFILE, f'Name: {ROW}', 'Name: r_coco', 'has models'),
    ],
)
def test_all_documents_are_written_or_none(document, old, new, message, published, repository):
    path = repository / document
    path.write_text(path.read_text().replace(old, new))
    before = contents(repository)
    error = main('--publish', '--out-dir', published[0])
    assert re.fullmatch('error: [^\n]+', error) and message in error
    assert contents(repository) == before


@pytest.mark.parametrize('content', [None, '{', '[]', '{"results": {}}', '{"results": {"a": {"0": {}}}}'])
def test_a_file_without_results_is_one_line(content, tmp_path, repository):
    if content is not None:
        (tmp_path / 'results.json').write_text(content)
    before = contents(repository)
    assert re.fullmatch('error: [^\n]+', main('--publish', '--out-dir', tmp_path))
    assert contents(repository) == before
