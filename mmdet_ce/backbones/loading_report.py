"""Report in one line what a checkpoint brought into a CE backbone; refuse one that brought nearly nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers import ChannelEquilibrium

# Of the backbone's plain tensors; some may differ with reason (the stem, in_channels, deformable convolutions).
LEAST_LOADED = 2 / 3
# What mmdet's ResNets and MobileNetV2 are made of, plugins and CE aside
PLAIN = re.compile(r'(layer(?P<stage>\d+)\.(?P<block>\d+)\.)?(conv\d|[bgl]n\d|downsample|stem|\w+_conv)\.')
CE_LEAF = re.compile(r'\.?(alpha|theta|bd\.running_\w+|ir\.\w+\.?\w*)$')


class CheckpointMismatchError(ValueError):
    """A checkpoint of another network, or one under another prefix."""


def summarize_load(backbone: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = '') -> str:
    """Say what loading ``state_dict`` brings into a CE backbone.

    Args:
        backbone: A backbone with CE layers.
        state_dict: The tensors to load, of the backbone or of the model around it.
        prefix: What the backbone's names begin with in ``state_dict``, '' or 'backbone.' for instance.

    Returns:
        One line: tensors loaded, CE tensors missing, unexpected tensors, and what that means.

    Raises:
        CheckpointMismatchError: If less than two thirds of the backbone's plain tensors are there in their shape, a
            stage has another number of blocks in the file, or more than a quarter of the file's have no place.
    """
    own = _tensors(backbone.state_dict(), '')
    given = _tensors(state_dict, prefix)
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, ChannelEquilibrium)}
    prefixes = tuple(f'{name}.' for name in layers)
    ce = {key for key in own if key.startswith(prefixes)}
    plain = [key for key in own if key not in ce and PLAIN.match(key)]
    loaded = {key for key, t in own.items() if key in given and given[key].shape == t.shape}
    unexpected = [key for key in given if key not in own]

    name = f'{type(backbone).__name__}-{backbone.depth}' if hasattr(backbone, 'depth') else type(backbone).__name__
    loaded_plain = sum(key in loaded for key in plain)
    if loaded_plain < LEAST_LOADED * len(plain):
        reshaped = [key for key in plain if key in given and key not in loaded]
        raise CheckpointMismatchError(
            f'only {loaded_plain} of {len(plain)} tensors of {name} (CE aside) are in this checkpoint'
            f'{f" in their shape ({reshaped[0]} has another)" if reshaped else ""}; it holds '
            f'{f"names like {[*state_dict][:2]}" if state_dict else f"no name that begins with {prefix!r}"}. '
            f'{_advice(state_dict, plain, prefix)}'
        )
    blocks, given_blocks = _num_blocks(own), _num_blocks(given)
    for stage in sorted(blocks.keys() & given_blocks.keys()):
        if blocks[stage] != given_blocks[stage]:
            raise CheckpointMismatchError(
                f'layer{stage} has {given_blocks[stage]} blocks in this checkpoint and {blocks[stage]} in {name}. '
                f'{_advice(state_dict, plain, prefix)}'
            )
    # A plain tensor without a place is one of another architecture, or of a stage that this backbone does without.
    given_plain = [key for key in given if (m := PLAIN.match(key)) and (not m['stage'] or m['stage'] in blocks)]
    surplus = [key for key in given_plain if key not in own]
    if len(surplus) > 0.25 * len(given_plain):
        raise CheckpointMismatchError(
            f'{len(surplus)} tensors of this checkpoint, like {surplus[0]}, have no place in {name}. '
            f'{_advice(state_dict, plain, prefix)}'
        )
    if any('.AR.fc.' in key for key in unexpected):
        advice = _advice(given, plain, prefix)
        raise CheckpointMismatchError(f'the CE tensors of this checkpoint have no place. {advice}')

    missing_ce = len(ce) - sum(key in loaded for key in ce)
    text = f'{len(unexpected)} unexpected'
    if unexpected:
        classifier = all(key.startswith(('fc.', 'head.')) for key in unexpected)
        text += ' (the classifier)' if classifier else f' ({unexpected[0]}, ...)'
    lost_ce = any(CE_LEAF.search(key) for key in unexpected)
    return (
        f'{name}: {len(loaded)} of {len(own)} tensors loaded, {missing_ce} of {len(ce)} CE tensors missing, '
        f'{text}: {_meaning(layers, len(ce), missing_ce, lost_ce)}'
    )


def _tensors(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under ``prefix`` that can be copied, without it; counters of batches aside."""
    return {
        str(key)[len(prefix) :]: t
        for key, t in state_dict.items()
        if isinstance(t, Tensor) and str(key).startswith(prefix) and not str(key).endswith('num_batches_tracked')
        if t.layout == torch.strided and not t.is_meta and not t.is_quantized and not t.is_nested
    }


def _num_blocks(keys: Iterable[str]) -> dict[str, int]:
    """Return the number of blocks of each stage that ``keys`` name."""
    matches = [match for match in map(PLAIN.match, keys) if match and match['stage']]
    return {stage: len({m['block'] for m in matches if m['stage'] == stage}) for stage in {m['stage'] for m in matches}}


def _meaning(layers: Mapping[str, ChannelEquilibrium], num_ce: int, num_missing: int, lost_ce: bool) -> str:
    if num_missing == num_ce and not lost_ce:
        if all(layer.alpha is not None for layer in layers.values()):
            return 'plain weights; CE starts as the identity and grows in.'
        return (
            'plain weights under an untrained CE, which disturbs every block that has it; use weights trained with CE, '
            'or ce_cfg=dict(num_channels=16, identity_start=True).'
        )
    if num_missing or lost_ce:
        return (
            'CE is loaded in part; the weights come from another arrangement of CE (stage_with_ce, stem_with_ce, '
            'identity_start): what is missing starts untrained, what is unexpected is lost.'
        )
    return 'CE is loaded with its statistics.'


def _advice(state_dict: Mapping[str, Tensor], plain: list[str], prefix: str) -> str:
    """Say what the names in a checkpoint hint at."""
    if any('.AR.fc.' in str(key) for key in state_dict):
        return "It is in the authors' layout: convert it with tools/model_converters/official_to_mmdet_ce.py."
    if prefix and not state_dict:
        return (
            "Expected a checkpoint of the whole detector; one of a backbone alone belongs in the backbone's "
            "init_cfg=dict(type='Pretrained', checkpoint=FILE)."
        )
    for other in ('backbone.', 'module.', 'module.backbone.', 'model.', 'encoder.'):
        if other != prefix and any(other + key in state_dict for key in plain):
            return f"Its names begin with '{other}': add prefix='{other}' to init_cfg=dict(type='Pretrained', ...)."
    return 'Expected weights of the same architecture and depth.'


def missing_weights_message(path: str) -> str:
    """Say what to do about pretrained weights that are not there."""
    message = (
        f'pretrained weights {path} not found (init_cfg); put them there, name others with --cfg-options '
        'model.backbone.init_cfg.checkpoint=FILE, or start from random weights with model.backbone.init_cfg=None'
    )
    if Path(path).name == 'ce-resnet50_imagenet.pth':
        message += (
            f". This one is the authors' ImageNet CE-ResNet-50 (linked from the Tangshitao/CENet repository) after "
            f'python tools/model_converters/official_to_mmdet_ce.py THEIR_FILE {path}. The configs named '
            'r50-ce-identity and r101-ce start from plain weights and need no such file'
        )
    return message
