"""Set the running statistics of a checkpoint's CE layers from the training set, and leave its weights alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from command_line import exit_on, exit_on_problems, flush_denormals, read_config

import torch
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_state_dict, set_random_seed

from mmdet_ce.calibration import calibrate
from mmdet_ce.checkpoints import CheckpointFileError, read_checkpoint, state_dict_of, write_checkpoint
from mmdet_ce.preflight import find_problems


def calibrate_checkpoint(
    cfg: Config, source: Path, destination: Path, num_batches: int, with_bn: bool, device: str
) -> int:
    """Calibrate ``source`` and write it, all else unchanged, to ``destination``; return the batches averaged over.

    Raises:
        CheckpointFileError: If ``source`` cannot be read or ``destination`` not be written.
        ValueError: If ``source`` does not belong to the config's model, or there is nothing to calibrate.
    """
    checkpoint = read_checkpoint(source)
    state_dict = state_dict_of(checkpoint, source)
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)  # as the Runner does
    model = MODELS.build(cfg.model).to(device)
    load_state_dict(model, state_dict, strict=False, logger='current')
    count = calibrate(model, Runner.build_dataloader(cfg.train_dataloader), num_batches, with_bn)
    for key, tensor in model.state_dict().items():
        if key.startswith('backbone.') and 'running_' in key:
            state_dict[key] = tensor.cpu()
    write_checkpoint(checkpoint, destination)
    return count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='the config of the training')
    parser.add_argument('checkpoint', type=Path, help='the checkpoint to start from')
    parser.add_argument('out', type=Path, help='the checkpoint to write')
    parser.add_argument('--num-batches', type=int, default=200, help='batches averaged over (default: %(default)s)')
    parser.add_argument('--bn', action='store_true', help="set BatchNorm's running statistics too")
    parser.add_argument('--seed', type=int, default=0, help='of the batches and their augmentation (default: 0)')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    args = parser.parse_args()
    cfg = read_config(args.config, args.cfg_options)
    if 'backbone' not in cfg.model:
        sys.exit(f'error: the model of {args.config} has no backbone to calibrate')
    cfg.model.backbone.init_cfg = None  # the checkpoint brings the weights
    cfg.load_from = str(args.checkpoint)  # where the check of the inputs looks for weights, also without a training
    exit_on_problems(find_problems(cfg, 'train'))
    flush_denormals()
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    set_random_seed(args.seed)
    with exit_on(CheckpointFileError, ValueError):
        count = calibrate_checkpoint(cfg, args.checkpoint, args.out, args.num_batches, args.bn, args.device)
    print(f'{args.out}: CE statistics{" and those of BN" if args.bn else ""} from {count} batches')


if __name__ == '__main__':
    main()
