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


def report_load(backbone: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = '') -> None:
    """Log what is about to be loaded; warn if nothing matches, or if CE tensors in the file have no place.

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
    if reshaped := [key for key in ce if given.get(key, own[key]) != own[key]]:
        raise RuntimeError(f'{name}: {_difference(own, given, reshaped)}')
    num_loaded, num_missing = sum(given.get(key) == own[key] for key in own), sum(key not in given for key in ce)
    text = f'{name}: {num_loaded} of {len(own)} tensors loaded, {num_missing} of {len(ce)} CE tensors missing, '
    text += f'{len(unexpected)} unexpected{f" (like {unexpected[0]!r})" if unexpected else ""}: '
    if num_loaded and not lost:
        print_log(text + _meaning(ce, num_missing), logger='current')
        return
    if any(map(OFFICIAL.search, lost)):
        text += "CE has the authors' names: convert the file with tools/model_converters/official_to_mmdet_ce.py"
    elif not num_loaded:
        text += _nothing_matches(own, state_dict, prefix)
    else:
        text += f'{len(lost)} CE tensors in the file, like {lost[0]!r}, have no place here; '
        text += 'use the ce_cfg, stage_with_ce and stem_with_ce of its training' if ce else 'set ce_cfg, which is None'
    warnings.warn(text, stacklevel=2)
    print_log(text, logger='current', level=logging.WARNING)


def _shapes(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Size]:
    """Return the shapes of the tensors under ``prefix``, without it; counters of batches aside."""
    return {
        str(key)[len(prefix) :]: t.shape
        for key, t in state_dict.items()
        if isinstance(t, Tensor) and str(key).startswith(prefix) and not str(key).endswith('num_batches_tracked')
    }


def _difference(own: Mapping[str, Size], given: Mapping[str, Size], reshaped: list[str]) -> str:
    """Name an argument of CE that differs, as far as shapes tell; the last layer has the most channels."""
    argument = 'expected weights of this architecture'
    for key in reshaped:
        theirs, ours = given[key], own[key]
        if key.endswith('bd.running_mean') and len(theirs) == 3 and theirs.numel() == ours.numel():
            argument = f'num_channels: {theirs[1]} in the file, {ours[1]} here'
        elif key.endswith('ir.fc1.weight') and theirs[1:] == ours[1:] and theirs[0]:
            argument = f'reduction: {ours[1] // theirs[0]} in the file, {ours[1] // ours[0]} here'
    return f'CE has another shape in the file; {argument} ({key}: {tuple(theirs)} in the file, {tuple(ours)} here)'


def _nothing_matches(own: Mapping[str, Size], state_dict: Mapping[str, Tensor], prefix: str) -> str:
    longest = max((key for key in own if not CE.search(key)), key=len)
    for key, value in state_dict.items():
        if str(key).endswith(f'.{longest}'):
            return f"add prefix={str(key)[: -len(longest)]!r} to init_cfg=dict(type='Pretrained', ...)"
        if isinstance(value, Mapping):
            return f'the weights may be under {key!r} in the file: save that part alone, with torch.save'
    if prefix:
        return f'no name begins with {prefix!r}; load the weights of a backbone alone with its init_cfg'
    return 'expected weights of this architecture'


def _meaning(ce: list[str], num_missing: int) -> str:
    if not num_missing:
        return 'CE is loaded with its statistics.'
    if num_missing < len(ce):
        return 'CE is loaded in part; what is missing keeps its values.'
    if sum(key.endswith('.alpha') for key in ce) == sum(key.endswith('.theta') for key in ce):
        return 'plain weights; CE starts as the identity and grows in.'
    return 'plain weights under an untrained CE: let norms and CE train (norm_eval=False), or use identity_start=True.'
