"""The backbone of a trained detector on its own."""

from __future__ import annotations

from pathlib import Path

from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

from . import read_checkpoint, state_dict_of


def load_backbone(cfg: Config, path: str | Path) -> nn.Module:
    """Build a config's backbone, in evaluation, with the weights of a detector's checkpoint or of a backbone's own.

    Raises:
        CheckpointFileError: If the checkpoint cannot be read.
        ValueError: If the config has no backbone, or the checkpoint does not fit it, tensor for tensor.
    """
    if 'backbone' not in cfg.get('model', {}):
        raise ValueError(f'the model of {cfg.filename} has no backbone')
    state_dict = state_dict_of(read_checkpoint(path), path)
    prefix = 'backbone.'
    own = {key[len(prefix) :]: t for key, t in state_dict.items() if key.startswith(prefix)} or state_dict
    backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None})  # the checkpoint brings the weights
    shapes, given = ({key: getattr(t, 'shape', None) for key, t in d.items()} for d in (backbone.state_dict(), own))
    misfits = [key for key in {**shapes, **given} if shapes.get(key) != given.get(key)]
    if misfits:
        raise ValueError(
            f'{path} holds another backbone than {cfg.filename}: {len(misfits)} tensors differ, like '
            f'{misfits[0]}; expected a checkpoint of a training of this config'
        )
    backbone.load_state_dict(own)
    backbone.eval()  # mmdet's returns nothing
    return backbone
