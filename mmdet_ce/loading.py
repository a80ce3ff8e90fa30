"""What a checkpoint brought into a CE backbone, in one line, and a refusal where it brought nearly nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .layers import ChannelEquilibrium

# Of the tensors that are not CE's; a few may differ with reason (in_channels, deformable convolutions, plugins).
LEAST_LOADED = 0.75
RESIDUAL_STAGE = re.compile(r'layer\d+\.\d+\.')


class CheckpointMismatchError(ValueError):
    """A checkpoint of another network, or one under another prefix."""


def summarize_load(backbone: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = '') -> str:
    """Say what loading ``state_dict`` brings into a CE backbone.

    Args:
        backbone: A backbone with CE layers or a slot for them.
        state_dict: The tensors to load, of the backbone or of the model around it.
        prefix: What the backbone's names begin with in ``state_dict``, '' or 'backbone.' for instance.

    Returns:
        One line: tensors loaded, CE tensors missing, unexpected tensors, and what that means.

    Raises:
        CheckpointMismatchError: If less than three quarters of the backbone's plain tensors are there in their shape,
            or more than a quarter of the residual blocks' tensors in the file have no place.
    """
    own = {key: t for key, t in backbone.state_dict().items() if not key.endswith('num_batches_tracked')}
    given = {key[len(prefix) :]: t for key, t in state_dict.items() if key.startswith(prefix)}
    given = {key: t for key, t in given.items() if not key.endswith('num_batches_tracked')}
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, ChannelEquilibrium)}
    is_ce = {key: any(key.startswith(f'{name}.') for name in layers) for key in own}

    loaded = {key for key, t in own.items() if key in given and given[key].shape == t.shape}
    plain, ce = [key for key in own if not is_ce[key]], [key for key in own if is_ce[key]]
    unexpected = [key for key in given if key not in own]
    classifier = [key for key in unexpected if key.startswith(('fc.', 'head.'))]

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
    blocks = [key for key in given if RESIDUAL_STAGE.match(key)]
    surplus = [key for key in blocks if key in unexpected]
    if len(surplus) > (1 - LEAST_LOADED) * len(blocks):
        raise CheckpointMismatchError(
            f'{len(surplus)} tensors of this checkpoint, like {surplus[0]}, have no place in {name}. '
            f'{_advice(state_dict, plain, prefix)}'
        )

    missing_ce = len(ce) - sum(key in loaded for key in ce)
    unexpected_text = f'{len(unexpected)} unexpected'
    if unexpected:
        unexpected_text += f' ({"the classifier" if len(classifier) == len(unexpected) else unexpected[0] + ", ..."})'
    return (
        f'{name}: {len(loaded)} of {len(own)} tensors loaded, {missing_ce} of {len(ce)} CE tensors missing, '
        f'{unexpected_text}: {_meaning(layers, len(ce), missing_ce)}'
    )


def _meaning(layers: Mapping[str, ChannelEquilibrium], num_ce: int, num_missing: int) -> str:
    if not num_ce:
        return 'a backbone without CE.'
    if not num_missing:
        return 'CE is loaded with its statistics.'
    if num_missing < num_ce:
        return (
            'CE is loaded in part; the weights come from another arrangement of CE (stage_with_ce, stem_with_ce, '
            'identity_start), and the rest starts untrained.'
        )
    if all(layer.alpha is not None for layer in layers.values()):
        return 'plain weights; CE starts as the identity and grows in.'
    return (
        'plain weights under an untrained CE, which disturbs every block that has it; use weights trained with CE, or '
        'ce_cfg=dict(num_channels=16, identity_start=True).'
    )


def _advice(state_dict: Mapping[str, Tensor], plain: list[str], prefix: str) -> str:
    """Say what the names in a checkpoint hint at."""
    if any('.AR.fc.' in key for key in state_dict):
        return "It is in the authors' layout: convert it with tools/model_converters/official_to_mmdet_ce.py."
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
