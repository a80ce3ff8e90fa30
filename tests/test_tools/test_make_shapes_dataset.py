"""The generated data set is deterministic and sound COCO."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from make_shapes_dataset import CLASSES, make_dataset
from pycocotools.coco import COCO


def digest(folder):
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    return [(str(p.relative_to(folder)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def test_same_arguments_give_the_same_files(tmp_path):
    for name in ('a', 'b'):
        make_dataset(tmp_path / name, train=3, val=2)
    make_dataset(tmp_path / 'c', train=3, val=2, seed=7)
    assert digest(tmp_path / 'a') == digest(tmp_path / 'b') != digest(tmp_path / 'c')
    assert len(digest(tmp_path / 'a')) == 7


def test_annotations_are_sound(tmp_path):
    make_dataset(tmp_path / 'shapes', train=10, val=1)
    coco = COCO(tmp_path / 'shapes' / 'annotations' / 'instances_train.json')
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    annotations = coco.loadAnns(coco.getAnnIds())
    assert {a['category_id'] for a in annotations} == {1, 2, 3, 4}
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        x, y, w, h = annotation['bbox']
        assert 0 <= x and 0 <= y and x + w <= 128 and y + h <= 128
        assert mask.sum() == annotation['area']
        ys, xs = np.nonzero(mask)
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + w, y + h)


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / 'mine').write_text('precious')
    with pytest.raises(FileExistsError, match='exists; remove it'):
        make_dataset(tmp_path / 'mine')
    assert (tmp_path / 'mine').read_text() == 'precious'
