"""Annotation files, classes and images of a run's data sets: what would fail in silence, or late."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from typing import Any

from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.config import Config
from mmengine.registry import Registry

LARGE = 50 << 20  # bytes. Of a larger file only the categories are read: all of COCO's takes half a minute
MANY = 20  # category names, of which a message gives no whole list


def nested_dicts(value: Any, place: str) -> Iterator[tuple[str, dict]]:
    """Iterate over the dicts nested in a value, each with its place, like 'model.neck.0'."""
    if isinstance(value, dict):
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from nested_dicts(item, f'{place}.{key}'.lstrip('.'))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is most like another, in any case; None if none is."""
    lowered = {name.lower(): name for name in names}
    matches = get_close_matches(name.lower(), lowered, 1)
    return lowered[matches[0]] if matches else None


def registered(registry: Registry, part: dict) -> type | None:
    """Return the class that a dict of a config names by its type; None if there is no such class."""
    kind = part.get('type')
    return kind if isinstance(kind, type) else registry.get(str(kind))


def is_missing(path: str) -> bool:
    """Return whether a local path does not exist; an address is left to the framework."""
    return '://' not in path and not Path(path).expanduser().exists()


class DataSet:
    """A data set of a config, built as the Runner does, but without its pipeline and its annotations.

    Attributes:
        place: Where it is in the config, like 'train_dataloader.dataset'.
        dataset: The data set itself.
        steps: The steps of its pipeline by their registered class, those inside other steps too.
        is_coco: Whether mmdet's own code reads the file as COCO's: classes are numbered by its categories.
        classes: The names of the classes.
    """

    def __init__(self, place: str, part: dict) -> None:
        kind = registered(DATASETS, part)
        self.place = place
        self.dataset = DATASETS.build({**part, 'pipeline': [], 'lazy_init': True, 'serialize_data': False})
        steps = [step for _, step in nested_dicts(part.get('pipeline'), '') if step.get('type')]
        self.steps = [(registered(TRANSFORMS, step) or object, step) for step in steps]
        self.is_coco = getattr(kind, 'load_data_list', None) is CocoDataset.load_data_list
        self.is_coco = self.is_coco and kind.COCOAPI is CocoDataset.COCOAPI
        self.classes = self.dataset.metainfo.get('classes') or ()

    @property
    def image_folder(self) -> str | None:
        """The folder that mmcv's LoadImageFromFile reads; None if something else loads the images."""
        loads = any(kind is LoadImageFromFile and not step.get('backend_args') for kind, step in self.steps)
        return self.dataset.data_prefix.get('img') if loads else None

    @property
    def uses_labels(self) -> bool:
        """Whether labels are loaded; the unlabelled part of a semi-supervised training has none."""
        loaders = [step for kind, step in self.steps if issubclass(kind, LoadAnnotations)]
        return not self.place.startswith('train_') or any(step.get('with_label', True) for step in loaders)


def read_data_sets(cfg: Config, splits: Sequence[str]) -> Iterator[DataSet]:
    """Iterate over the data sets of splits like 'train' that read a local annotation file."""
    for split in splits:
        for place, part in nested_dicts(cfg.to_dict().get(f'{split}_dataloader'), f'{split}_dataloader'):
            is_local = '://' not in f'{part.get("data_root")}{part.get("ann_file")}' and not part.get('backend_args')
            if is_local and part.get('ann_file') and registered(DATASETS, part):
                yield DataSet(place, part)


def data_problems(cfg: Config, splits: Sequence[str]) -> Iterator[str]:
    """Look at the files that data sets and evaluators read: one line for each problem."""
    readable = []
    for data in read_data_sets(cfg, splits):
        file = data.dataset.ann_file
        fault = None
        if is_missing(file):
            yield f'annotation file {file} not found; set {data.place}.ann_file and data_root'
        elif data.image_folder and is_missing(data.image_folder):
            yield f'image folder {data.image_folder} not found; set {data.place}.data_prefix and data_root'
        elif data.is_coco and isinstance(data.classes, str):
            yield f'{data.place} has the text {data.classes!r} as classes; expected a tuple, ({data.classes!r},)'
        elif data.is_coco:
            fault = _reading_fault(data)
            if fault is None:
                readable.append(data)
            else:
                yield f'{file} {fault}'
    names = {data.dataset.ann_file: _category_names(data.dataset.ann_file) for data in readable}
    for data in readable:
        fault = _class_fault(data, names) or _content_fault(data)
        if fault:
            yield fault
    for split in splits:
        for place, part in nested_dicts(cfg.to_dict().get(f'{split}_evaluator'), f'{split}_evaluator'):
            file = part.get('ann_file')
            if not file or part.get('backend_args') or '://' in file:
                continue
            if is_missing(file):
                yield f'annotation file {file} not found; set {place}.ann_file'
            elif registered(METRICS, part) is CocoMetric and file in names and _lacks_crowds(file):
                yield f"{file} has annotations without 'iscrowd', which {place} needs; 0 is a single object"


def _is_large(file: str) -> bool:
    return os.path.getsize(file) > LARGE


def _reading_fault(data: DataSet) -> str | None:
    """Let mmdet read a file, as the run will, and say what it fails on."""
    file = data.dataset.ann_file
    if _is_large(file):
        return None
    try:
        with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere):
            data.dataset.full_init()
    except json.JSONDecodeError as error:
        beginning = Path(file).read_text()[:20]
        return f'is not valid JSON ({error}). It has {os.path.getsize(file)} bytes and begins with {beginning!r}'
    except KeyError as error:
        return f'has an entry without {error}, which mmdet needs'
    except Exception as error:
        return f"is not in COCO's format: {type(error).__name__}: {error}"
    return None


def _content_fault(data: DataSet) -> str | None:
    """Say what mmdet would leave out of a file in silence, or fail on in the middle of the run."""
    file = data.dataset.ann_file
    if _is_large(file):
        return None
    content = json.loads(Path(file).read_text())
    annotations = content.get('annotations', [])
    images = data.dataset.data_list
    boxes = [box for image in images for box in image.get('instances', [])]
    ids = [category['id'] for category in content['categories']]
    strange = [annotation['category_id'] for annotation in annotations if annotation['category_id'] not in ids]
    if data.uses_labels and strange:
        found = f'{len(strange)} of its {len(annotations)} annotations have a category_id that no category has'
        return f'{file}: {found}, like {strange[0]!r}; the categories have {short(ids)}'
    trains = data.place.startswith('train_')
    drops_empty = trains and (data.dataset.filter_cfg or {}).get('filter_empty_gt')
    if not images or (drops_empty and not boxes):
        found = f'{len(content.get("images", []))} images and {len(annotations)} annotations'
        return f'{file}: mmdet can use none of {found}. It leaves out boxes of other categories and under 1 pixel'
    without = sum('mask' not in box for box in boxes)
    if without and any(step.get('with_mask') for _, step in data.steps):
        found = f'{file} has no masks for {without} of its {len(boxes)} boxes'
        return f'{found}, but {data.place} asks for them (with_mask=True). Use a box detector or set with_mask=False'
    missing = (image['img_path'] for image in images if data.image_folder and is_missing(image['img_path']))
    for path in missing:
        near = nearest(os.path.basename(path), os.listdir(data.image_folder))
        found = f'{data.image_folder} has {near!r}. ' if near else ''
        return f'{file} names the image {path}, not found. {found}Correct its file_name or {data.place}.data_prefix'
    return None


def _lacks_crowds(file: str) -> bool:
    annotations = [] if _is_large(file) else json.loads(Path(file).read_text()).get('annotations', [])
    return not all('iscrowd' in annotation for annotation in annotations)


def _category_names(file: str) -> list[str]:
    """Return the names of the categories in the order of a file; of a large one nothing if they are not clear."""
    if not _is_large(file):
        return [category['name'] for category in json.loads(Path(file).read_text())['categories']]
    key = b'"categories"'
    found = []
    with open(file, 'rb') as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(key)
        while place >= 0:
            text = content[place + len(key) : place + (1 << 20)].decode(errors='ignore').lstrip(': \t\r\n')
            with suppress(ValueError, LookupError, TypeError):  # another thing of this name
                value = json.JSONDecoder().raw_decode(text)[0]
                found.append([category['name'] for category in value if category['id'] is not None])
            place = content.find(key, place + 1)
    return found[0] if len(found) == 1 else []


def _class_fault(data: DataSet, names: dict[str, list[str]]) -> str | None:
    """Hold classes against the categories of the file: mmdet takes those that it finds, in the order of the file."""
    file = data.dataset.ann_file
    own = names[file]
    known = [name for name in own if name in data.classes]
    if known == list(data.classes) or not (own and data.uses_labels):
        return None
    missing = [name for name in data.classes if name not in own]
    elsewhere = {name for other in names if other != file for name in names[other]}
    if len(set(known)) < len(known):
        return f'{file} has two categories of one name, and mmdet counts each as a class; merge them: {short(known)}'
    if known and missing and elsewhere.issuperset(missing):
        return f'{file} lacks the category {missing[0]!r} of another file; add the missing category to that file'
    near = {name: nearest(name, own) for name in missing if nearest(name, own)}
    to_write = tuple(own)
    text = f'has the classes {short(tuple(data.classes))}, and {file} has {len(own)}, {short(own)}'
    if len(near) == len(missing):
        to_write = tuple(name for name in own if name in {*data.classes, *near.values()})
        text = f'has the classes in another order than {file}'
    if near:
        name, match = next(iter(near.items()))
        text = f'has the class {name!r}, and {file} has none; the nearest name there is {match!r}'
    if len(to_write) > MANY:
        return f'{data.place} {text}. Write names of the file, in its order'
    return f'{data.place} {text}. Write metainfo=dict(classes={to_write}), and num_classes={len(to_write)} in the heads'
