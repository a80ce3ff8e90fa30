"""Find what is wrong with a run's inputs before the run starts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.fileio import load

from .backbones.loading_report import missing_weights_message
from .checkpoints import CheckpointFileError, read_checkpoint
from .checkpoints.resume import read_training

CE_TYPES = ('CEMobileNetV2', 'CEResNeXt', 'CEResNet', 'CEResNetV1d', 'ChannelEquilibrium')
CUSTOM_IMPORTS = "custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)"
MAX_READ = 10 << 20  # bytes of an annotation file: a second; COCO's own would take half a minute, at every start


def find_problems(cfg: Config, split: str, checkpoint: Optional[str] = None) -> list[str]:
    """Check the files that a run needs and the import that makes CE known to MMDetection's own tools.

    Remote paths (``s3://...``, ``torchvision://...``) are left to the framework.

    Args:
        cfg: The run's config, with its command-line options merged.
        split: 'train' (looks at the validation set too) or 'test'.
        checkpoint: The checkpoint to resume from or to test, if the command line names one.

    Returns:
        One sentence for each problem: what is wrong, what was expected, what to do. Empty if all is well.
    """
    problems = []
    dicts = list(_dicts(cfg.get('model', {})))
    imports = (cfg.get('custom_imports') or {}).get('imports')
    used = sorted({name for name in (re.sub(r'^mmdet\.', '', str(d.get('type'))) for d in dicts) if name in CE_TYPES})
    if used and not imports:  # a module of the user's own may import mmdet_ce
        problems.append(
            f'the config uses {" and ".join(used)} but does not import mmdet_ce; add this line: {CUSTOM_IMPORTS}'
        )

    for name in ('train', 'val') if split == 'train' else ('test',):
        loader = cfg.get(f'{name}_dataloader') or {}
        for dataset in _dicts(loader.get('dataset') or {}):
            problems += _dataset_problems(dataset, f'{name}_dataloader.dataset')
        for evaluator in _dicts(cfg.get(f'{name}_evaluator') or {}):
            path = evaluator.get('ann_file')
            if path and not evaluator.get('backend_args') and _is_missing(path):
                problems.append(
                    f'annotation file {path} not found; set {name}_evaluator.ann_file to the annotations of the data '
                    'that is evaluated'
                )

    read = read_training if split == 'train' else read_checkpoint
    for path, read_path in ((checkpoint, read), (cfg.get('load_from') if split == 'train' else None, read_checkpoint)):
        if path and _is_missing(path):
            problems.append(f'checkpoint {path} not found; expected a file that a training wrote, like epoch_12.pth')
        elif path and (problem := _file_problem(path, read_path)):
            problems.append(problem)
    # The framework loads these before every training, a resumed one too, and never for a test.
    for d in dicts if split == 'train' else []:
        path = d.get('checkpoint') if d.get('type') == 'Pretrained' else None
        if path and _is_missing(path):
            problems.append(missing_weights_message(path))
        elif path and (problem := _file_problem(path)):
            problems.append(f'pretrained weights: {problem}')
    return list(dict.fromkeys(problems))


def _dicts(value: Any) -> Iterator[dict]:
    """Iterate over all dicts nested in ``value``."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _dicts(item)


def _is_missing(path: Any) -> bool:
    return isinstance(path, (str, Path)) and '://' not in str(path) and not Path(path).expanduser().exists()


def _file_problem(path: Any, read: Callable[[Path], Any] = read_checkpoint) -> Optional[str]:
    """Say what is wrong with a local file as a checkpoint; None for a remote one."""
    if '://' in str(path):
        return None
    try:
        read(Path(path).expanduser())
    except CheckpointFileError as error:
        return str(error)
    return None


def _dataset_problems(dataset: dict, where: str) -> list[str]:
    """Check one dataset config: its root, its annotation file, its image folders."""
    if dataset.get('backend_args'):
        return []
    root = str(dataset.get('data_root') or '')
    if root and _is_missing(root):
        return [f'data root {root} does not exist ({where}.data_root); set it to the folder that holds the data set']
    if '://' in root or 'ann_file' not in dataset:
        return []
    problems = []
    ann_file = Path(root) / str(dataset['ann_file'])
    if dataset['ann_file'] and not ann_file.is_file():
        problems.append(f'annotation file {ann_file} not found ({where}.ann_file, relative to its data_root)')
    elif dataset['ann_file'] and (problem := _annotation_problem(dataset, ann_file, where)):
        problems.append(problem)
    prefixes = dataset.get('data_prefix') or {}
    for key, prefix in (prefixes if isinstance(prefixes, dict) else {'img': prefixes}).items():
        folder = Path(root) / str(prefix)
        if prefix and '://' not in str(prefix) and not folder.is_dir():
            problems.append(f'image folder {folder} not found ({where}.data_prefix.{key}, relative to its data_root)')
    return problems


def _annotation_problem(dataset: dict, ann_file: Path, where: str) -> Optional[str]:
    """Say why the framework cannot read an annotation file in COCO's format, or finds nothing of use in it."""
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(kind, type) and issubclass(kind, CocoDataset)):
        return None
    name = f'annotation file {ann_file} ({where}.ann_file)'
    expected = "expected COCO's JSON: a dict of images, annotations and categories"
    if ann_file.stat().st_size > MAX_READ:
        with open(ann_file, 'rb') as file:
            start, _, end = file.read(64), file.seek(-64, io.SEEK_END), file.read()
        is_dict = start.lstrip().startswith(b'{') and end.rstrip().endswith(b'}')
        return None if is_dict else f'{name} is incomplete or no JSON; {expected}'
    try:
        with redirect_stdout(io.StringIO()):
            # Not by the registry: that of mmengine 0.8 makes another error of what goes wrong
            arguments = {key: value for key, value in dataset.items() if key not in ('type', '_scope_')}
            built = kind(**{**arguments, 'pipeline': [], 'serialize_data': False, 'lazy_init': False})
    except Exception as error:
        return f'{name} cannot be read ({type(error).__name__}: {error}); {expected}'
    classes, found = built.metainfo.get('classes', ()), getattr(built, 'cat_ids', None)
    if found is not None and len(found) < len(classes):
        names = {category['name'] for category in load(ann_file)['categories']}
        if names.intersection(classes) != set(classes[: len(found)]):  # the framework numbers those it finds from 0
            return (
                f'{name} has categories for {len(found)} of the {len(classes)} classes {classes[:4]}...; expected '
                f'all; set {where}.metainfo.classes, or add the others to the file'
            )
    if not len(built):
        return f'{name} leaves no image; each needs an object of a known class, and the size that filter_cfg asks for'
    path = built.get_data_info(0).get('img_path')
    image = Path(path) if isinstance(path, str) and '://' not in path else None
    if image and image.parent.is_dir() and not image.is_file():
        return f'{image}, the first image of {name}, not found; set {where}.data_prefix.img'
    return None
