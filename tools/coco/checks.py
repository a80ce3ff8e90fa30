"""What is wrong with the data, the weights and the machine, found before anything starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from launch import Launch
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from mmdet_ce.preflight import find_problems

IMAGES = {'train2017': 118_287, 'val2017': 5_000}


def annotation_file(root: Path, split: str) -> Path:
    """Return the annotations of a split, 'train2017' or 'val2017'."""
    return root / 'annotations' / f'instances_{split}.json'


def config_problems(configs: list[Config]) -> list[str]:
    """Check each config's files as tools/train.py does, and fetch the weights that the framework would download."""
    problems = [problem for cfg in configs for split in ('train', 'test') for problem in find_problems(cfg, split)]
    weights = dict.fromkeys(path for cfg in configs for path in _remote_weights(cfg.model))
    return list(dict.fromkeys(problems)) + [problem for path in weights for problem in _fetch(path)]


def data_problems(root: Path, subset: bool, found: list[str]) -> tuple[list[str], int]:
    """Check the data set.

    Args:
        root: Its folder.
        subset: Whether other numbers of images than COCO's are expected.
        found: What ``config_problems`` has found.

    Returns:
        These problems and the data set's own, one sentence each, and the number of training images with objects.
    """
    if not root.is_dir():
        others = [problem for problem in found if f' {root}/' not in problem]
        return [f'data root {root} not found; expected the folder of COCO 2017, --data-root names it', *others], 0
    counts = {}
    for split in IMAGES:
        problems, counts[split] = _split_problems(root, split, subset)
        named = any(f'annotation file {annotation_file(root, split)} ' in problem for problem in found)
        found = [*found, *([] if named else problems)]
    return found, counts['train2017']


def _split_problems(root: Path, split: str, subset: bool) -> tuple[list[str], int]:
    """Count the images of a split in its annotations and in its folder; what is not there is named by others.

    Returns:
        One sentence for each problem, and the number of images with objects.
    """
    file, folder = annotation_file(root, split), root / split
    if not file.is_file() or not folder.is_dir():
        return [], 0
    try:
        content = json.loads(file.read_bytes())
        names = {image['file_name'] for image in content['images']}
        with_objects = len({annotation['image_id'] for annotation in content['annotations']})
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{file} cannot be read ({type(error).__name__}: {error}); expected COCO's annotations"], 0
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    problems = []
    if not subset and len(names) != IMAGES[split]:
        problems.append(f'{file} lists {len(names):,} images, {_expected(split)}')
    if not subset and len(sizes) != IMAGES[split]:
        problems.append(f'{folder} holds {len(sizes):,} images, {_expected(split)}')
    for what, bad in (('missing', names - sizes.keys()), ('empty', {name for name in names if sizes.get(name) == 0})):
        if bad:
            problems.append(
                f'{len(bad):,} of the {len(names):,} images that {file} lists are {what} in {folder}, like '
                f'{min(bad)}; unpack the images again'
            )
    return problems, with_objects


def machine_problems(launch: Launch) -> list[str]:
    """Check that the GPUs are there; those of a cluster are Slurm's to find."""
    found = torch.cuda.device_count()
    if launch.kind == 'slurm' or found >= launch.gpus:
        return []
    return [f'--gpus {launch.gpus}: this machine has {found}; name as many, or 0 to train on the CPU']


def _expected(split: str) -> str:
    return f"expected COCO's {IMAGES[split]:,}; for a try on a part of COCO add --subset"


def _remote_weights(value: object) -> list[str]:
    """Return the weights in a model's config that are not on this machine, like torchvision://resnet50."""
    if isinstance(value, (list, tuple)):
        return [path for item in value for path in _remote_weights(item)]
    if not isinstance(value, dict):
        return []
    own = str(value.get('checkpoint')) if value.get('type') == 'Pretrained' else ''
    return ([own] if '://' in own else []) + _remote_weights(list(value.values()))


def _fetch(path: str) -> list[str]:
    """Load weights as the framework does, which downloads them once."""
    try:
        CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    except Exception as error:  # each source of weights has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [
            f'weights {path} could not be fetched ({reason}); run this once where the network is, or put the file into '
            f'{Path(torch.hub.get_dir(), "checkpoints")}'
        ]
    return []
