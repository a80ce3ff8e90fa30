"""Annotation files, classes and images of a run's data sets: what would fail in silence, or late."""

from __future__ import annotations

import json
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


def parts_of(cfg: Config, key: str) -> Iterator[tuple[str, dict]]:
    """Iterate over the dicts in a part of a config, like 'model', each with its place."""
    return nested_dicts(cfg.to_dict().get(key), key)


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
        file: Its annotation file.
        steps: The steps of its pipeline by their registered class, those inside other steps too.
        is_coco: Whether mmdet's own code reads the file as COCO's: classes are numbered by its categories.
        classes: The names of the classes.
        content: What is in the file, once it is read; None of a large file.
        categories: The names of the categories in the order of the file, once it is read.
    """

    def __init__(self, place: str, part: dict) -> None:
        kind = registered(DATASETS, part)
        self.place = place
        self.dataset = DATASETS.build({**part, 'pipeline': [], 'lazy_init': True, 'serialize_data': False})
        self.file: str = self.dataset.ann_file
        steps = [step for _, step in nested_dicts(part.get('pipeline'), '') if step.get('type')]
        self.steps = [(registered(TRANSFORMS, step) or object, step) for step in steps]
        self.is_coco = getattr(kind, 'load_data_list', None) is CocoDataset.load_data_list
        self.is_coco = self.is_coco and kind.COCOAPI is CocoDataset.COCOAPI
        self.classes = self.dataset.metainfo.get('classes') or ()
        self.content: dict | None = None
        self.categories: list[str] = []

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

    def read(self) -> None:
        """Let mmdet read the file, as the run will, and keep what it reads; of a large file take the categories."""
        if os.path.getsize(self.file) > LARGE:
            self.categories = _find_categories(self.file)
            return
        self.dataset.COCOAPI = self._keep_content
        with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere):
            self.dataset.full_init()
        self.categories = [category['name'] for category in self.content['categories']]

    def _keep_content(self, path: str) -> Any:
        coco = CocoDataset.COCOAPI(path)
        self.content = coco.dataset
        return coco


def _find_categories(file: str) -> list[str]:
    """Return the names of the categories of a large file without reading the rest; nothing if they are not clear."""
    found = []
    for rest in Path(file).read_bytes().split(b'"categories"')[1:]:
        text = rest[: 1 << 20].decode(errors='ignore').lstrip(': \t\r\n')
        with suppress(ValueError, LookupError, TypeError):  # another thing of this name
            value = json.JSONDecoder().raw_decode(text)[0]
            found.append([category['name'] for category in value if category['id'] is not None])
    return found[0] if len(found) == 1 else []


def read_data_sets(cfg: Config, splits: Sequence[str]) -> Iterator[DataSet]:
    """Iterate over the data sets of splits like 'train' that read a local annotation file."""
    for split in splits:
        for place, part in parts_of(cfg, f'{split}_dataloader'):
            is_local = '://' not in f'{part.get("data_root")}{part.get("ann_file")}' and not part.get('backend_args')
            if is_local and part.get('ann_file') and registered(DATASETS, part):
                yield DataSet(place, part)


def data_problems(cfg: Config, splits: Sequence[str]) -> Iterator[str]:
    """Look at the files that data sets and evaluators read: one line for each problem."""
    readable = []
    for data in read_data_sets(cfg, splits):
        fault = _file_fault(data)
        if fault:
            yield fault
        elif data.is_coco:
            readable.append(data)
    for data in readable:
        fault = _class_fault(data, readable) or _content_fault(data)
        if fault:
            yield fault
    for split in splits:
        contents = {data.file: data.content for data in readable if data.content and data.place.startswith(split)}
        for place, part in parts_of(cfg, f'{split}_evaluator'):
            yield from _evaluator_faults(split, place, part, contents)


def _evaluator_faults(split: str, place: str, part: dict, contents: dict[str, dict]) -> Iterator[str]:
    """Say what is wrong with an evaluator's file; ``contents`` has those of the split's data sets by their files."""
    file = part.get('ann_file')
    if not file or '://' in file or part.get('backend_args'):
        return
    if is_missing(file):
        yield f'annotation file {file} not found; set {place}.ann_file'
        return
    if registered(METRICS, part) is not CocoMetric or not contents or os.path.getsize(file) > LARGE:
        return
    content = contents.get(file) or json.loads(Path(file).read_text())
    annotations = content.get('annotations', [])
    if not all('iscrowd' in one for one in annotations):
        yield f"{file} has annotations without 'iscrowd', which {place} needs; 0 is a single object"
    if not all(one['id'] for one in annotations):  # pycocotools marks a match by its id
        yield f'{file} has an annotation with id 0, which COCO counts as not found; number them from 1'
    images = _image_names(content)
    if not any(_image_names(own) <= images for own in contents.values()):  # each may have its evaluator
        yield f'{file} of {place} has other images than {split}_dataloader'


def _image_names(content: dict) -> set[str]:
    return {image['file_name'] for image in content['images']}


def _file_fault(data: DataSet) -> str | None:
    """Say which path is missing, or what mmdet fails on when it reads the file."""
    if is_missing(data.file):
        return f'annotation file {data.file} not found; set {data.place}.ann_file and data_root'
    if data.image_folder and is_missing(data.image_folder):
        return f'image folder {data.image_folder} not found; set {data.place}.data_prefix and data_root'
    if not data.is_coco:
        return None
    if isinstance(data.classes, str):
        return f'{data.place} has the text {data.classes!r} as classes; expected a tuple, ({data.classes!r},)'
    try:
        data.read()
    except json.JSONDecodeError as error:
        return f'{data.file} is not valid JSON ({error}). It begins with {error.doc[:20]!r}'
    except KeyError as error:
        return f'{data.file} has an entry without {error}, which mmdet needs'
    except Exception as error:
        return f"{data.file} is not in COCO's format: {type(error).__name__}: {error}"
    return None


def _content_fault(data: DataSet) -> str | None:
    """Say what mmdet would leave out of a file in silence, or fail on in the middle of the run."""
    if data.content is None:
        return None
    annotations = data.content.get('annotations', [])
    images = data.dataset.data_list
    boxes = [box for image in images for box in image.get('instances', [])]
    ids = [category['id'] for category in data.content['categories']]
    strange = [annotation['category_id'] for annotation in annotations if annotation['category_id'] not in ids]
    if data.uses_labels and strange:
        found = f'{len(strange)} of its {len(annotations)} annotations have a category_id that no category has'
        return f'{data.file}: {found}, like {strange[0]!r}; the categories have {short(ids)}'
    trains = data.place.startswith('train_')
    drops_empty = trains and (data.dataset.filter_cfg or {}).get('filter_empty_gt')
    if not images or (drops_empty and not boxes):
        found = f'{len(data.content.get("images", []))} images and {len(annotations)} annotations'
        return f'{data.file}: mmdet can use none of {found}, as of other images or categories, or under 1 pixel'
    outside = sum(
        box['bbox'][2] > 1.05 * image['width'] or box['bbox'][3] > 1.05 * image['height']
        for image in images
        for box in image.get('instances', [])
    )
    if outside > len(boxes) / 2:  # a corner in place of the size
        return f'{data.file}: {outside} of its {len(boxes)} boxes leave their images; bbox is [x, y, width, height]'
    without = sum('mask' not in box for box in boxes)
    if without and any(step.get('with_mask') for _, step in data.steps):
        found = f'{data.file} has no masks for {without} of its {len(boxes)} boxes'
        return f'{found}, but {data.place} asks for them (with_mask=True). Use a box detector or set with_mask=False'
    for image in images if data.image_folder else []:
        if is_missing(image['img_path']):
            found = f'{data.file} names the image {image["img_path"]}, not found'
            return f'{found}. Correct its file_name or {data.place}.data_prefix'
    return None


def _class_fault(data: DataSet, others: list[DataSet]) -> str | None:
    """Hold classes against the categories of the file: mmdet takes those that it finds, in the order of the file."""
    own = data.categories
    known = [name for name in own if name in data.classes]
    if known == list(data.classes) or not (own and data.uses_labels):
        return None
    missing = [name for name in data.classes if name not in own]
    elsewhere = {name for other in others for name in other.categories}
    if known and missing and elsewhere.issuperset(missing):
        return f'{data.file} lacks the category {missing[0]!r} of another file; add the missing category to that file'
    near = [_nearest(name, own) for name in missing]
    to_write = tuple(own if None in near else [name for name in own if name in {*data.classes, *near}])
    text = f'has the classes {short(tuple(data.classes))}, and {data.file} has {len(own)}, in this order: {short(own)}'
    if missing and near[0]:
        text = f'has the class {missing[0]!r}, and {data.file} has none; the nearest name there is {near[0]!r}'
    if len(to_write) > MANY:
        return f'{data.place} {text}. Write names of the file, in its order'
    return f'{data.place} {text}. Write metainfo=dict(classes={to_write}), and num_classes={len(to_write)} in the heads'


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is most like another, in any case; None if none is."""
    lowered = {name.lower(): name for name in names}
    matches = get_close_matches(name.lower(), lowered, 1)
    return lowered[matches[0]] if matches else None
