"""Convert the authors' ImageNet CE-ResNet checkpoint into weights for ``init_cfg=dict(type='Pretrained', ...)``.

Strict: every tensor of the backbone must be there in its shape, and none be left over but the classifier.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import exit_on_problems

import torch

from mmdet_ce import CEResNet
from mmdet_ce.checkpoints import convert_official_state_dict, write_checkpoint


def convert(source: Path, destination: Path, depth: int = 50) -> int:
    """Convert ``source`` and return the number of tensors written."""
    converted = convert_official_state_dict(torch.load(source, map_location='cpu', weights_only=True))
    backbone = CEResNet(depth=depth)
    backbone.load_state_dict(converted)
    write_checkpoint(dict(state_dict=backbone.state_dict()), destination)  # ours: with T in its metadata
    return len(converted)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path, help="the authors' file")
    parser.add_argument('destination', type=Path, nargs='?', default='checkpoints/ce-resnet50_imagenet.pth')
    parser.add_argument('--depth', type=int, default=50, help='depth of the network (default: %(default)s)')
    args = parser.parse_args()
    try:
        count = convert(args.source, args.destination, args.depth)
    except (OSError, ValueError, RuntimeError) as error:
        exit_on_problems([' '.join(str(error).split())])  # torch's message has lines, and the names in the file
    print(f'{args.destination}: {count} tensors, 0 missing, 0 unexpected; the classifier was left out')


if __name__ == '__main__':
    main()
