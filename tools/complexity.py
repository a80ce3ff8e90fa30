"""Count parameters and multiply-adds of the configs' CE backbones against the same backbones with CE switched off.

mmengine's complexity analysis, with CE's matrix products counted. Prints a table in Markdown; what the analysis does
not count (reductions and element-wise operations, as for every network) is named below it.
"""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path

from command_line import read_config

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.analysis import FlopAnalyzer
from mmengine.analysis.jit_handles import get_shape
from torch import nn


def count(backbone: nn.Module, size: tuple[int, int]) -> tuple[int, int, set[str]]:
    """Return parameters, multiply-adds on one image of ``size``, and the operations that were not counted."""
    analyzer = FlopAnalyzer(backbone.eval(), torch.zeros(1, 3, *size))
    # baddbmm(constant, matrix, x): (B, d, d) times (B, d, L)
    analyzer.set_op_handle(
        'aten::baddbmm', lambda inputs, _: math.prod(get_shape(inputs[1])) * get_shape(inputs[2])[-1]
    )
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    parameters = sum(p.numel() for p in backbone.parameters())
    return parameters, int(analyzer.total()), set(analyzer.unsupported_ops())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--size', type=int, nargs=2, default=[800, 1280], help='height, width (default: 800 1280)')
    args = parser.parse_args()
    logging.getLogger('jit_analysis').setLevel(logging.ERROR)
    register_all_modules()
    skipped = set()
    print('| config | parameters (M): CE / plain | multiply-adds (G): CE / plain |\n| --- | --- | --- |')
    for path in args.configs:
        cfg = read_config(path).model.backbone
        cfg.init_cfg = None
        counts = []
        for ce_cfg in (cfg.get('ce_cfg', dict(num_channels=16)), None):
            parameters, flops, uncounted = count(MODELS.build({**cfg, 'ce_cfg': ce_cfg}), tuple(args.size))
            skipped |= uncounted
            counts.append((parameters / 1e6, flops / 1e9))
        (ce_parameters, ce_flops), (parameters, flops) = counts
        print(
            f'| {path.stem} | {ce_parameters:.2f} / {parameters:.2f} (+{100 * (ce_parameters / parameters - 1):.1f}%) '
            f'| {ce_flops:.1f} / {flops:.1f} (+{100 * (ce_flops / flops - 1):.1f}%) |'
        )
    print(f'\nBackbones, one image of {args.size[0]}x{args.size[1]}. Not counted: {", ".join(sorted(skipped))}')


if __name__ == '__main__':
    main()
