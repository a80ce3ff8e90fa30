"""What every backbone with Channel Equilibrium has in common: building, folding, modes, loading, warnings."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import compat
from ..layers import ChannelEquilibrium
from ..ops.precision import is_tracing
from .loading_report import ce_settings, report_load, settings_difference, warn


def build_ce(ce_cfg: dict, in_channels: int) -> ChannelEquilibrium:
    """Build the CE layer of a slot from ``ce_cfg``; its type, if given, names a subclass of ChannelEquilibrium."""
    return MODELS.build({'type': ChannelEquilibrium, **ce_cfg, 'in_channels': in_channels})


def check_stages(
    stage_with_ce: Optional[Sequence[bool]], default: tuple[bool, ...], num_stages: int, ce_cfg: Optional[dict]
) -> tuple[bool, ...]:
    """Return for each stage whether its blocks have CE: ``default`` for None, nowhere without ``ce_cfg``."""
    if ce_cfg is not None and not isinstance(ce_cfg, dict):
        raise ValueError(f'ce_cfg must be a dict of arguments of ChannelEquilibrium, or None, got {ce_cfg!r}')
    stages = default if stage_with_ce is None else stage_with_ce
    if not isinstance(stages, Sequence) or len(stages) != num_stages or any(s not in (True, False) for s in stages):
        raise ValueError(f'stage_with_ce needs True or False for each of the {num_stages} stages, got {stages!r}')
    return tuple(stages) if ce_cfg is not None else (False,) * num_stages


def run_block(block: BaseModule, inner_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a block's inner forward, under activation checkpointing if the block asks for it."""
    return checkpoint(inner_forward, x, use_reentrant=False) if block.with_cp and x.requires_grad else inner_forward(x)


class CEBackbone(BaseModule):
    """Mixin for a backbone of mmdet, named before it among the bases; the backbone sets ``norm_eval``."""

    def __init__(self, *args: Any, ce_eval: Optional[bool] = None, **kwargs: Any) -> None:
        if ce_eval not in (None, True, False):
            raise TypeError(f'ce_eval must be True, False or None, got {ce_eval!r}')
        self._check_names(kwargs)
        # Set before the backbone's constructor, which calls train() on the way.
        self.ce_eval = ce_eval
        self._statistics_checked = False
        super().__init__(*args, **kwargs)

    def _check_names(self, kwargs: dict) -> None:
        """Refuse an argument that no class of the backbone has, and name the nearest one."""
        known = {name for cls in type(self).__mro__[:-1] for name in inspect.signature(cls.__init__).parameters}
        for name in kwargs.keys() - known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f'; did you mean {nearest[0]!r}?' if nearest else ''
            if name != 'in_channels' and name in inspect.signature(ChannelEquilibrium).parameters:
                hint = f'; write ce_cfg=dict({name}=...)'
            raise TypeError(f'{type(self).__name__} has no argument {name!r}{hint}')

    def train(self, mode: bool = True) -> CEBackbone:
        """Set the mode. Frozen stages stay in evaluation; so do norms with ``norm_eval`` and CE with ``ce_eval``."""
        super().train(mode)
        self._statistics_checked = False
        if mode and (self.norm_eval if self.ce_eval is None else self.ce_eval):
            for _, ce in self.named_ce():
                ce.eval()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # T, d and the position of CE go into torch's metadata of the state dict, which checkpoints keep.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, '_metadata', {}).get(prefix[:-1])
        if metadata is not None and ce_settings(self):
            metadata['ce_cfg'] = ce_settings(self)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        # torch and mmengine both call this method; mmengine does not call load_state_dict.
        report_load(self, state_dict, prefix, local_metadata.get('ce_cfg', {}))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def init_weights(self) -> None:
        """Initialize the weights as ``init_cfg`` says; warn if a pretrained file was trained with another CE."""
        super().init_weights()
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('prefix'):
            # mmengine takes the prefix off the names of the tensors, and the metadata is lost.
            checkpoint = CheckpointLoader.load_checkpoint(self.init_cfg['checkpoint'], map_location='cpu')
            metadata = getattr(checkpoint.get('state_dict', checkpoint), '_metadata', {})
            recorded = metadata.get(self.init_cfg['prefix'].rstrip('.'), {}).get('ce_cfg', {})
            difference = settings_difference(self, recorded)
            if difference:
                warn(f'{type(self).__name__}: {difference}')

    def named_ce(self) -> Iterator[tuple[str, ChannelEquilibrium]]:
        """Iterate over the backbone's CE layers and their names."""
        return ((name, m) for name, m in self.named_modules() if isinstance(m, ChannelEquilibrium))

    def check_statistics(self) -> None:
        """Warn, once after each change of the mode, if a CE is evaluated with statistics that no data ever updated."""
        if self._statistics_checked or compat.is_compiling() or is_tracing():
            return
        self._statistics_checked = True
        unset = [name for name, ce in self.named_ce() if not ce.training and ce.lacks_statistics and not ce.is_identity]
        if unset:
            ways = ['load a checkpoint trained with CE (init_cfg or load_from)']
            if self.norm_eval if self.ce_eval is None else self.ce_eval:
                ways.append('train with norm_eval=False, or with ce_eval=False beside frozen norms')
            if getattr(self, 'frozen_stages', -1) >= 0:
                ways.append('freeze no stage that has such a layer (frozen_stages=-1)')
            ways.append('in the teacher of a semi-supervised training, set MeanTeacherHook(skip_buffer=False)')
            warn(
                f'{len(unset)} CE layers are in evaluation with statistics that no data ever updated: '
                f'{", ".join(unset)}. Ways out: {"; ".join(ways)}.'
            )
