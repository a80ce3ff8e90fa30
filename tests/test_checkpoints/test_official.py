"""The names of the released code become this package's."""

from __future__ import annotations

import pytest
import torch

from mmdet_ce import CEResNet
from mmdet_ce.checkpoints.official import BLOCK_NAMES, convert_official_state_dict


def released(depth: int = 18, base_channels: int = 16) -> dict:
    """A state dict in the released layout, made from ours."""
    official = {ours: name for name, ours in BLOCK_NAMES.items()}
    state = {}
    for key, value in CEResNet(depth=depth, base_channels=base_channels).state_dict().items():
        head, _, leaf = key.partition('ce.') if '.ce.' in key else key.partition('ce1.')
        state[key if not leaf else key[: -len(leaf)] + official[leaf]] = value
    return {**state, 'fc.weight': torch.zeros(10, 128), 'fc.bias': torch.zeros(10)}


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('wrapped', [True, False])
def test_whole_network(prefix, wrapped):
    backbone = CEResNet(depth=18, base_channels=16)
    state = {prefix + key: value for key, value in released().items()}
    converted = convert_official_state_dict({'epoch': 3, 'state_dict': state} if wrapped else state)
    backbone.load_state_dict(converted, strict=True)
    assert any(key.endswith('.x_weight') for key in state) and not any('fc.' == key[:3] for key in converted)


def test_plain_checkpoint_is_refused():
    with pytest.raises(ValueError, match='no CE tensor .* expected a checkpoint of the released CE-ResNet'):
        convert_official_state_dict({'conv1.weight': torch.zeros(1)})
