"""Set the running statistics of a checkpoint's CE layers from the training set, and leave its weights alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from command_line import exit_on_problems, read_config

from mmdet.registry import MODELS
from mmengine.config import DictAction
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed

from mmdet_ce.calibration import calibrate
from mmdet_ce.checkpoints import read_checkpoint, write_checkpoint


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint', type=Path, help='the checkpoint to start from')
    parser.add_argument('out', type=Path, help='the checkpoint to write')
    parser.add_argument('--num-batches', type=int, default=200, help='batches averaged over (default: %(default)s)')
    parser.add_argument('--bn', action='store_true', help="set BatchNorm's running statistics too")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    args = parser.parse_args()
    cfg = read_config(args.config, args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    set_random_seed(0)  # of the batches and their augmentation
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)  # as the Runner does
    try:
        checkpoint = read_checkpoint(args.checkpoint)
        state_dict = checkpoint.get('state_dict', checkpoint)
        model = MODELS.build(cfg.model).to(get_device())
        model.load_state_dict(state_dict)
        count = calibrate(model, Runner.build_dataloader(cfg.train_dataloader), args.num_batches, args.bn)
        state_dict.update({key: tensor.cpu() for key, tensor in model.state_dict().items() if 'running_' in key})
        write_checkpoint(checkpoint, args.out)
    except (OSError, ValueError) as error:
        exit_on_problems([str(error)])
    print(f'{args.out}: CE statistics{" and those of BN" if args.bn else ""} from {count} batches')


if __name__ == '__main__':
    main()
