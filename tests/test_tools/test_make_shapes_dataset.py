"""The generated data set is deterministic and sound COCO."""

from __future__ import annotations

import pytest
from make_shapes_dataset import CLASSES, make_dataset
from pycocotools.coco import COCO


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_same_arguments_give_the_same_files_and_an_existing_folder_is_left_alone(tmp_path):
    for name in ('a', 'b'):
        make_dataset(tmp_path / name, train=3, val=2)
    before = contents(tmp_path / 'a')
    assert len(before) == 7 and before == contents(tmp_path / 'b')
    with pytest.raises(FileExistsError, match='exists; remove it'):
        make_dataset(tmp_path / 'a', train=1)
    assert before == contents(tmp_path / 'a')


def test_annotations_are_sound(tmp_path):
    make_dataset(tmp_path / 'shapes', train=10, val=1)
    coco = COCO(tmp_path / 'shapes' / 'annotations' / 'instances_train.json')
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    annotations = coco.loadAnns(coco.getAnnIds())
    assert {a['category_id'] for a in annotations} == {1, 2, 3, 4}
    for annotation in annotations:
        assert coco.annToMask(annotation).sum() == annotation['area']
