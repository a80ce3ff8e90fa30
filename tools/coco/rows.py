"""The rows of configs/ce/README.md, and the plain config that each is compared with."""

from __future__ import annotations

import re
from pathlib import Path

from mmengine.config import Config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'ce'
# Both detectors of the paper's kind, from both kinds of weights.
DEFAULT = [
    'mask-rcnn_r50-ce_fpn_1x_coco',
    'mask-rcnn_r50-ce-identity_fpn_1x_coco',
    'retinanet_r50-ce_fpn_1x_coco',
    'retinanet_r50-ce-identity_fpn_1x_coco',
]
CE_ARGUMENTS = ('ce_cfg', 'ce_eval', 'stage_with_ce', 'stem_with_ce')


def all_rows() -> list[str]:
    """Return the names of all rows."""
    return sorted(path.stem for path in CONFIGS.glob('*.py'))


def plain_name(row: str) -> str:
    """Return the name of a row's plain counterpart, which mmdet's config has: several rows may share one."""
    return re.sub(r'(-syncbn)?-ce(-identity)?_', '_', row)


def plain_config(row: str) -> Config:
    """Return a row's config with the backbone of the ``mmdet::`` config that it inherits from.

    All else is the row's: schedule, data, precision, hooks. Where that config has a backbone of another family, as
    for MobileNetV2, the plain backbone is the row's own without CE.
    """
    cfg = Config.fromfile(CONFIGS / f'{row}.py')
    base = Config.fromstring(f"_base_ = '{_baseline(CONFIGS / f'{row}.py')}'", '.py').model.backbone
    plain_type = cfg.model.backbone.type.replace('CE', '', 1)
    if base.type != plain_type:
        own = {key: value for key, value in cfg.model.backbone.items() if key not in CE_ARGUMENTS}
        base = {**own, 'type': plain_type}
    cfg.model.backbone = base
    return cfg


def _baseline(path: Path) -> str:
    """Return the ``mmdet::`` config at the root of a config's ``_base_``."""
    base = re.search(r"^_base_ = '(.+)'$", path.read_text(), flags=re.M)[1]
    return base if base.startswith('mmdet::') else _baseline(path.parent / base)
