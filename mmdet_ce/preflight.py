"""Find what is wrong with a run's inputs before the run starts."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config

CE_TYPES = ('CEResNet', 'ChannelEquilibrium')
CUSTOM_IMPORTS = "custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)"


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
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    used = sorted({str(d['type']) for d in dicts if d.get('type') in CE_TYPES})
    if used and 'mmdet_ce' not in ([imports] if isinstance(imports, str) else imports):
        problems.append(
            f'the config uses {" and ".join(used)} but does not import mmdet_ce; add this line: {CUSTOM_IMPORTS}'
        )

    for name in ('train', 'val') if split == 'train' else ('test',):
        loader = cfg.get(f'{name}_dataloader') or {}
        for dataset in _dicts(loader.get('dataset') or {}):
            problems += _dataset_problems(dataset, f'{name}_dataloader.dataset')
        for evaluator in _dicts(cfg.get(f'{name}_evaluator') or {}):
            path = evaluator.get('ann_file')
            if path and _is_missing(path):
                problems.append(
                    f'annotation file {path} not found; set {name}_evaluator.ann_file to the annotations of the data '
                    'that is evaluated'
                )

    if checkpoint and _is_missing(checkpoint):
        problems.append(f'checkpoint {checkpoint} not found; expected a file that a training wrote, like epoch_12.pth')
    elif checkpoint and _is_truncated(checkpoint):
        problems.append(f'checkpoint {checkpoint} is incomplete (its writing was interrupted?); use another one')
    # The framework loads these before every training, a resumed one too, and never for a test.
    for d in dicts if split == 'train' else []:
        path = d.get('checkpoint') if d.get('type') == 'Pretrained' else None
        if path and _is_truncated(path):
            problems.append(f'pretrained weights {path} are incomplete (an interrupted download?); get them again')
        if path and _is_missing(path):
            problems.append(
                f'pretrained weights {path} not found (model init_cfg); put them there, name others with --cfg-options '
                'model.backbone.init_cfg.checkpoint=FILE, or start from random weights with '
                'model.backbone.init_cfg=None'
            )
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
    return isinstance(path, (str, Path)) and '://' not in str(path) and not Path(path).exists()


def _is_truncated(path: Any) -> bool:
    """Whether a file that starts as torch.save's zip archive does not end as one, or is empty."""
    if not Path(path).is_file():
        return False
    with open(path, 'rb') as file:
        start = file.read(2)
    return not start or (start == b'PK' and not zipfile.is_zipfile(path))


def _dataset_problems(dataset: dict, where: str) -> list[str]:
    """Check one dataset config: its root, its annotation file, its image folders."""
    if 'ann_file' not in dataset or dataset.get('backend_args'):
        return []
    root = str(dataset.get('data_root') or '')
    if root and _is_missing(root):
        return [f'data root {root} does not exist ({where}.data_root); set it to the folder that holds the data set']
    if '://' in root:
        return []
    problems = []
    ann_file = Path(root) / str(dataset['ann_file'])
    if dataset['ann_file'] and not ann_file.is_file():
        problems.append(f'annotation file {ann_file} not found ({where}.ann_file, relative to its data_root)')
    for key, prefix in (dataset.get('data_prefix') or {}).items():
        folder = Path(root) / str(prefix)
        if prefix and '://' not in str(prefix) and not folder.is_dir():
            problems.append(f'image folder {folder} not found ({where}.data_prefix.{key}, relative to its data_root)')
    return problems
