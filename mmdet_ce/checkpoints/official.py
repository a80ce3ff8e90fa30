"""From the names of the released code to this package's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# released name inside one CE block -> name inside ChannelEquilibrium
BLOCK_NAMES = {
    'x_weight': 'theta',
    'running_mean': 'bd.running_mean',
    'running_wm': 'bd.running_whitening',
    'AR.running_scale': 'ir.running_scale',
    'AR.fc.0.weight': 'ir.fc1.weight',
    'AR.fc.1.weight': 'ir.norm.weight',
    'AR.fc.1.bias': 'ir.norm.bias',
    'AR.fc.3.weight': 'ir.fc2.weight',
}
CE = re.compile(rf'((?:ce1|layer\d+\.\d+\.ce)\.|)({"|".join(map(re.escape, BLOCK_NAMES))})')


def convert_official_state_dict(state_dict: Mapping) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint of the released code, for ``load_state_dict`` to check.

    Accepts a whole network or a single block, the tensors themselves or a checkpoint that holds them under
    ``state_dict``, with or without DistributedDataParallel's ``module.`` prefix. The classifier (``fc.*``) is dropped.

    Returns:
        The state dict of a ``CEResNet`` or of a ``ChannelEquilibrium``; the tensors are the given ones.

    Raises:
        ValueError: If there is no CE tensor in it.
    """
    state_dict = state_dict.get('state_dict', state_dict)
    named = {re.sub(r'^module\.', '', str(key)): tensor for key, tensor in state_dict.items()}
    matches = {key: CE.fullmatch(key) for key in named if not key.startswith('fc.')}
    if not any(matches.values()):
        raise ValueError(
            'no CE tensor (ce1.* or layerN.M.ce.*) in this state dict: expected a checkpoint of the released '
            f'CE-ResNet, got {len(named)} tensors like {[*named][:3]}'
        )
    return {match[1] + BLOCK_NAMES[match[2]] if match else key: named[key] for key, match in matches.items()}
