"""What in a run's config would fail in silence, or late: looked for before the run starts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from reprlib import repr as short
from typing import Any, Sequence

import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config

MASKS = re.compile(rb'"segmentation"\s*:\s*[\[{]\s*[^\]\s]|"segments_info"')
NOT_CE = ('norm_cfg', 'conv_cfg', 'act_cfg', 'plugins', 'dcn')
CE_TYPES = ('CEMobileNetV2', 'CEResNeXt', 'CEResNet', 'CEResNetV1d', 'ChannelEquilibrium')


def find_problems(cfg: Config, splits: Sequence[str]) -> list[str]:
    """Return a line for each problem of a run that reads ``cfg.load_from`` and the data of splits like 'train'."""
    parts = dict(_dicts(cfg.to_dict()))
    read = tuple(f'{split}_{what}' for split in splits for what in ('dataloader', 'evaluator'))
    data = {place: part for place, part in parts.items() if place.startswith(read) and part.get('ann_file')}
    problems = [problem for place, part in data.items() for problem in _data_problems(part, place)]
    found = () if problems else map(_classes, data.values())  # of wrong classes the number says nothing
    if cfg.get('load_from') and _is_missing(cfg.load_from):
        problems.append(f'checkpoint {cfg.load_from} not found; expected a file that a training wrote')
    classes = next((names for names in found if isinstance(names, tuple)), ())
    for place in filter(lambda place: place.startswith('model.'), parts):
        problems += _model_problems(parts[place], place, cfg, classes, 'train' in splits)
    return list(dict.fromkeys(problems))


def _dicts(value: Any, place: str = '') -> Iterator[tuple[str, dict]]:
    """Iterate over the dicts nested in a value, each with its place, like 'model.neck.0'."""
    if isinstance(value, dict):
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from _dicts(item, f'{place}.{key}'.lstrip('.'))


def _is_missing(path: Any) -> bool:
    return '://' not in str(path) and not Path(path).expanduser().exists()


def _model_problems(part: dict, place: str, cfg: Config, classes: tuple[str, ...], trains: bool) -> Iterator[str]:
    name, known = re.sub(r'^mmdet\.', '', str(part.get('type'))), {known.lower(): known for known in CE_TYPES}
    if name in CE_TYPES and not (cfg.get('custom_imports') or {}).get('imports'):  # a user's module may import mmdet_ce
        yield f"{name} needs this line: custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)"
    elif name[:2].upper() == 'CE' and not MODELS.get(name):
        for near in get_close_matches(name.lower(), known, 1):
            yield f'type={name!r} is not registered; the nearest name is {known[near]}'
    elif name in CE_TYPES and place.endswith('.backbone'):
        try:  # without what needs mmdet's scope or a process group
            MODELS.build({key: value for key, value in part.items() if key not in NOT_CE})
        except (TypeError, ValueError) as error:
            yield f'{place}: {error}'
    is_head = re.search(r'(bbox|mask)_head(\.\d+)?$', place) and 'language_model' not in cfg.model
    if is_head and classes and part.get('num_classes', len(classes)) != len(classes):
        yield f'{place}.num_classes is {part["num_classes"]}; the data has {len(classes)} classes, {short(classes)}'
    path = str(part.get('checkpoint') or '') if trains else ''  # a test does not read it
    if path.startswith('torchvision://') and not find_spec('torchvision'):
        yield f'{path} needs torchvision: pip install torchvision torch=={torch.__version__}'
    elif path and _is_missing(path):
        yield f'pretrained weights {path} not found; docs/weights.md says where some are, {place}=None trains without'


def _data_problems(part: dict, place: str) -> Iterator[str]:
    """Look at what a data set or an evaluator reads: the annotation file, its categories, the image folder."""
    if part.get('backend_args') or part.get('file_client_args'):
        return
    root = part.get('data_root') or ''
    if _is_missing(ann_file := os.path.join(root, part['ann_file'])):
        yield f'annotation file {ann_file} not found; set {place}.ann_file and data_root'
        return
    loader, prefix = next(iter(part.get('pipeline') or ()), {}), part.get('data_prefix') or ''
    images = os.path.join(root, prefix.get('img') or '' if isinstance(prefix, dict) else prefix)
    if str(loader.get('type')).endswith('LoadImageFromFile') and not loader.get('backend_args') and _is_missing(images):
        yield f'image folder {images} not found; set {place}.data_prefix and data_root'
    classes, wants_masks = _classes(part), any(step.get('with_mask') for step in part.get('pipeline') or ())
    file = Path(ann_file).expanduser()
    content = file.read_bytes() if (classes or wants_masks) and file.is_file() else b''
    if wants_masks and b'"bbox"' in content and not MASKS.search(content):
        yield f'{ann_file} has no masks, which {place} loads; take a detector of boxes, or with_mask=False'
    names = _category_names(content) if classes else None
    if isinstance(classes, str):
        yield f'{place}.metainfo.classes is the text {classes!r}; expected a tuple, with a comma: ({classes!r},)'
    # mmdet takes the categories that it finds, and numbers them in the order of the file
    elif names is not None and tuple(name for name in names if name in classes) != classes:
        yield (
            f'{place} has the classes {short(classes)}, and {ann_file} has {short(names)}. Expected names of the file, '
            f'in its order: write metainfo=dict(classes={names}) there, and num_classes={len(names)} into the heads'
        )


def _classes(part: dict) -> tuple[str, ...] | str | None:
    """Return the classes of a data set that numbers them by the categories of a COCO file, else None."""
    kind = DATASETS.get(str(part.get('type')))
    if getattr(kind, 'load_data_list', None) is not CocoDataset.load_data_list or 'thing_classes' in kind.METAINFO:
        return None
    classes = (part.get('metainfo') or {}).get('classes', kind.METAINFO['classes']) or ()
    if isinstance(classes, str) and Path(classes).is_file():
        return tuple(Path(classes).read_text().splitlines())
    return classes if isinstance(classes, str) else tuple(classes)


def _category_names(content: bytes) -> Any:
    """Read the categories alone: all of COCO's file takes half a minute. None is for what the framework refuses."""
    with suppress(ValueError, AttributeError, LookupError, TypeError):
        start = re.search(rb'"categories"\s*:\s*', content).end()
        text = content[start : start + (1 << 24)].decode(errors='ignore')
        return tuple(category['name'] for category in json.JSONDecoder().raw_decode(text)[0])
