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
# a tensor of a CE block in the released network
CE_KEY = re.compile(r'(?P<prefix>(?:ce1|layer\d+\.\d+\.ce)\.)(?P<leaf>.+)')


def convert_official_state_dict(state_dict: Mapping) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint of the released code.

    Accepts a whole network or a single block, the tensors themselves or a checkpoint that holds them under
    ``state_dict``, with or without DistributedDataParallel's ``module.`` prefix. The classifier (``fc.*``) is dropped.
    Tensors are neither copied nor changed.

    Args:
        state_dict: The released state dict, or the checkpoint around it.

    Returns:
        The state dict of a ``CEResNet`` or of a ``ChannelEquilibrium``.

    Raises:
        ValueError: If there is no CE tensor in it, or a CE block has a tensor of unknown name or lacks one.
    """
    if isinstance(state_dict.get('state_dict'), Mapping):
        state_dict = state_dict['state_dict']
    named = {re.sub(r'^module\.', '', str(key)): tensor for key, tensor in state_dict.items()}
    if 'x_weight' in named:
        return _convert_block(named, '')

    converted, blocks = {}, {}
    for key, tensor in named.items():
        match = CE_KEY.fullmatch(key)
        if match:
            blocks.setdefault(match['prefix'], {})[match['leaf']] = tensor
        elif not key.startswith('fc.'):
            converted[key] = tensor
    if not blocks:
        raise ValueError(
            'no CE tensor (ce1.* or layerN.M.ce.*) in this state dict: expected a checkpoint of the released '
            f'CE-ResNet, got {len(named)} tensors like {[*named][:3]}'
        )
    for prefix, block in blocks.items():
        converted.update(_convert_block(block, prefix))
    return converted


def _convert_block(block: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    unknown, missing = sorted(block.keys() - BLOCK_NAMES.keys()), sorted(BLOCK_NAMES.keys() - block.keys())
    if unknown or missing:
        raise ValueError(
            f"CE block '{prefix.rstrip('.')}' does not have the released layout: unknown {unknown}, missing {missing}"
        )
    return {prefix + name: block[official] for official, name in BLOCK_NAMES.items()}
