"""Say in one line what a checkpoint brings into a backbone with CE; refuse CE tensors of another shape."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping

from mmengine.logging import print_log
from torch import Size, Tensor, nn

# how the names of CE tensors end, here and in the authors' files
CE = re.compile(r'\.(theta|alpha|bd\.running_\w+|ir\.(fc1|fc2|norm|running_scale).*)$')
OFFICIAL = re.compile(r'\.(x_weight|running_wm|AR\..+)$')


def ce_settings(backbone: nn.Module) -> dict:
    """Return what a checkpoint records of CE beside its tensors: the values of T and d, and the position."""
    layers = [ce for _, ce in backbone.named_ce()]
    if not layers:
        return {}
    return dict(
        num_iterations=sorted({ce.bd.num_iterations for ce in layers}),
        num_channels=sorted({ce.group_size for ce in layers}),
        ce_position=getattr(backbone, 'ce_position', None),
    )


def report_load(backbone: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, recorded: Mapping) -> None:
    """Log what is about to be loaded; warn if nothing fits, or if the file has another CE.

    Args:
        backbone: A backbone with ``named_ce``.
        state_dict: The tensors to load.
        prefix: What the names of the backbone's tensors begin with.
        recorded: The ``ce_settings`` of the checkpoint; empty where it has none.

    Raises:
        RuntimeError: If a CE tensor has another shape in the file. mmengine would leave it out and go on.
    """
    own, given = _shapes(backbone.state_dict(), ''), _shapes(state_dict, prefix)
    ce = [key for key in own if CE.search(key)]
    unexpected = [key for key in given if key not in own]
    lost = [key for key in unexpected if CE.search(key) or OFFICIAL.search(key)]
    if not (ce or lost):
        return
    name = f'{type(backbone).__name__}-{backbone.depth}' if hasattr(backbone, 'depth') else type(backbone).__name__
    settings = settings_difference(backbone, recorded)
    for key in ce:
        if given.get(key, own[key]) != own[key]:
            shapes = f'{key} is {tuple(given[key])} in the file and {tuple(own[key])} here'
            raise RuntimeError(f'{name}: CE has another shape in the file: {shapes}. {settings or SAME_TRAINING}')
    num_loaded = sum(given.get(key) == own[key] for key in own)
    num_missing = sum(key not in given for key in ce)
    counts = f'{name}: {num_loaded} of {len(own)} tensors loaded, {num_missing} of {len(ce)} CE tensors missing, '
    counts += f'{len(unexpected)} unexpected'
    if unexpected:
        counts += f' (like {unexpected[0]!r})'
    problem = _problem(own, state_dict, num_loaded, lost) or settings
    if problem:
        warn(f'{counts}. {problem}')
    else:
        print_log(f'{counts}. {_meaning(ce, num_missing)}', logger='current')


SAME_TRAINING = 'Use the ce_cfg and the other backbone arguments of the training that wrote the file'


def settings_difference(backbone: nn.Module, recorded: Mapping) -> str:
    """Return a sentence on what differs between the CE of a file and a backbone's; empty if nothing does."""
    own = ce_settings(backbone)
    names = [name for name in own if recorded.get(name, own[name]) != own[name]]
    differences = ', '.join(f'{name} is {recorded[name]} in the file and {own[name]} here' for name in names)
    return f'The file was trained with another CE: {differences}. {SAME_TRAINING}' if names else ''


def warn(text: str) -> None:
    """Warn on the console, and in the file of a training's log."""
    warnings.warn(text, stacklevel=2)
    print_log(text, logger='current', level=logging.WARNING)


def _shapes(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Size]:
    """Return the shapes of the tensors under ``prefix``, without it; counters of batches aside."""
    return {
        str(key)[len(prefix) :]: t.shape
        for key, t in state_dict.items()
        if isinstance(t, Tensor) and str(key).startswith(prefix) and not str(key).endswith('num_batches_tracked')
    }


def _problem(own: Mapping[str, Size], state_dict: Mapping[str, Tensor], num_loaded: int, lost: list[str]) -> str:
    """Return why the load is not what was meant, with the way out; empty if it may be."""
    if any(map(OFFICIAL.search, lost)):
        return "CE has the authors' names: convert the file with tools/model_converters/official_to_mmdet_ce.py"
    if not num_loaded:
        longest = max((key for key in own if not CE.search(key)), key=len)
        for key in map(str, state_dict):
            if key.endswith(f'.{longest}'):
                return f"Add prefix={key[: -len(longest)]!r} to init_cfg=dict(type='Pretrained', ...)"
        return "The file has no weights of this backbone; a backbone's own weights load by its init_cfg"
    if lost:
        return f'CE tensors of the file have no place here. {SAME_TRAINING}'
    return ''


def _meaning(ce: list[str], num_missing: int) -> str:
    if not num_missing:
        return 'CE is loaded with its statistics'
    if num_missing < len(ce):
        return 'The missing CE tensors keep their values'
    if any(key.endswith('.alpha') for key in ce):
        return 'These are plain weights; CE starts as the identity (identity_start)'
    return (
        'These are plain weights and CE is untrained: train norms and CE (norm_eval=False), or set identity_start=True'
    )
