"""What in a run's config would fail in silence, or late: looked for before the run starts."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from reprlib import repr as short
from typing import Any

import torch
from annotation_checks import data_problems, is_missing, nested_dicts, parts_of, read_data_sets, registered
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config
from mmengine.runner import Runner

from mmdet_ce import CECalibrationHook
from mmdet_ce.backbones.ce_backbone import CEBackbone

# Arguments that need mmdet's scope or a process group, or load weights. They do not change which CE is in evaluation.
NOT_BUILT = ('norm_cfg', 'conv_cfg', 'act_cfg', 'plugins', 'dcn', 'init_cfg', 'pretrained')
PLAIN_WEIGHTS = ('torchvision://', 'https://download.pytorch.org/', 'open-mmlab://')
# The parts of a config that MMEngine and mmdet's tools read
READ = {
    *inspect.signature(Runner.__init__).parameters,
    *('activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'runner_type', 'sync_bn', 'tta_model', 'tta_pipeline'),
}


def find_problems(cfg: Config, splits: Sequence[str]) -> list[str]:
    """Return a line for each problem of a run that reads ``cfg.load_from`` and the data of splits like 'train'."""
    problems = _collect(data_problems(cfg, splits))
    if not problems:  # of wrong classes the number says nothing
        problems += _collect(_head_problems(cfg, splits))
    problems += _collect(_weight_problems(cfg, 'train' in splits))
    problems += _collect(_network_problems(cfg, 'train' in splits))
    return list(dict.fromkeys(problems))


def option_problems(cfg: Config, options: dict[str, Any]) -> list[str]:
    """Return a line for each option of the command line that nothing reads, though a part of the config has its name.

    Such are the variables of a config file, like ``max_epochs`` beside ``train_cfg = dict(max_epochs=max_epochs)``.
    """
    content = cfg.to_dict()
    parts = dict(nested_dicts(content, ''))
    problems = []
    for option, value in options.items():
        parent, _, name = option.rpartition('.')
        if option.split('.')[0] in READ:
            continue
        variable = parts.get(parent, {})
        places = [
            f'{place}.{name}={value}'
            for place, part in parts.items()
            if place.split('.')[0] in READ and name in part and part[name] == variable.get(name, part[name])
        ]
        if places:
            problems.append(f'nothing reads the option {option}; use {" ".join(places[:4])}')
    return problems


def _collect(problems: Iterator[str]) -> list[str]:
    """Return the problems that a check finds. If the check itself fails, the framework decides about the config."""
    found = []
    try:
        for problem in problems:
            found.append(problem)
    except Exception as error:
        warnings.warn(f'a check before the start failed, and is left out: {error!r}', stacklevel=2)
    return found


def _head_problems(cfg: Config, splits: Sequence[str]) -> Iterator[str]:
    """Hold the number of classes of the heads against the data's; class-agnostic masks do not use it."""
    classes = next((data.classes for data in read_data_sets(cfg, splits) if data.is_coco and data.uses_labels), ())
    if not classes or 'language_model' in cfg.model:
        return
    for place, part in parts_of(cfg, 'model'):
        is_used = re.search(r'(bbox|mask)_head(\.\d+)?$', place) and not part.get('class_agnostic')
        if is_used and part.get('num_classes', len(classes)) != len(classes):
            yield f'{place}.num_classes is {part["num_classes"]}; the data has {len(classes)} classes, {short(classes)}'


def _weight_problems(cfg: Config, trains: bool) -> Iterator[str]:
    """Look for the files of weights; a test does not read those that a training starts from."""
    if cfg.get('load_from') and is_missing(cfg.load_from):
        yield f'checkpoint {cfg.load_from} not found; expected a file that a training wrote'
    for place, part in parts_of(cfg, 'model'):
        path = str(part.get('checkpoint') or '') if trains else ''
        if path.startswith('torchvision://') and not find_spec('torchvision'):
            yield f'{path} needs torchvision. Install it, or name an address as configs/custom does: {place}.checkpoint'
        elif path and is_missing(path):
            yield f'pretrained weights {path} not found; docs/weights.md names some; {place}=None takes none'


def _network_problems(cfg: Config, trains: bool) -> Iterator[str]:
    """Look at the arguments and the statistics of CE backbones."""
    for place, part in parts_of(cfg, 'model'):
        kind = registered(MODELS, part)
        if isinstance(kind, type) and issubclass(kind, CEBackbone):
            yield from _backbone_problems(cfg, place, part, trains)


def _backbone_problems(cfg: Config, place: str, part: dict, trains: bool) -> Iterator[str]:
    arguments = {name: value for name, value in part.items() if name not in NOT_BUILT}
    try:
        with torch.device('meta'):  # without memory and random numbers: a tenth of a second
            backbone = MODELS.build(arguments).train()
    except (TypeError, ValueError) as error:
        yield f'{place}: {error}'
        return
    unset = [name for name, ce in backbone.named_ce() if not ce.training and ce.alpha is None]
    if trains and unset and not _brings_statistics(cfg):
        yield (
            f'{place}: {len(unset)} CE layers, like {unset[0]}, would be evaluated with statistics that no data ever '
            'updated. Let CE train: frozen_stages=-1, and norm_eval=False (with frozen norms ce_eval=False). Or start '
            'from weights that were trained with CE, by init_cfg or load_from'
        )


def _brings_statistics(cfg: Config) -> bool:
    """Return whether CE's statistics may come from a file or from CECalibrationHook."""
    hooks = parts_of(cfg, 'custom_hooks')
    if cfg.get('load_from') or cfg.get('resume') or CECalibrationHook in [registered(HOOKS, hook) for _, hook in hooks]:
        return True
    files = [part.get('checkpoint') or part.get('pretrained') for _, part in parts_of(cfg, 'model')]
    return any(_may_hold_statistics(file) for file in files if file)


def _may_hold_statistics(file: str) -> bool:
    """Return whether CE's statistics are in a file of weights; True if the file cannot be looked into."""
    if file.startswith(PLAIN_WEIGHTS):
        return False
    try:
        checkpoint = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        return any(name.endswith('running_whitening') for name in checkpoint.get('state_dict', checkpoint))
    except Exception:
        return True
