"""Convert the authors' ImageNet CE-ResNet checkpoint into weights for ``init_cfg=dict(type='Pretrained', ...)``.

Strict: every tensor of the backbone must be there in its shape, and none be left over but the classifier. The file
holds tensors only, with the source's hash and the converter's version beside them, and is written whole or not at all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import Tensor

from mmdet_ce import CEResNet, __version__
from mmdet_ce.checkpoints import CheckpointFileError, read_checkpoint, sha256, write_checkpoint
from mmdet_ce.checkpoints.official import convert_official_state_dict


def convert(source: Path, destination: Path, depth: int = 50) -> int:
    """Convert ``source`` and return the number of tensors written.

    Raises:
        CheckpointFileError: If ``source`` cannot be read or ``destination`` not be written.
        ValueError: If ``source`` is not a checkpoint of the released network of this depth; the tensors are listed.
    """
    if source.resolve() == destination.resolve():
        raise ValueError(f'{destination} is the source itself; name another file to write')
    checkpoint = read_checkpoint(source)
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{source} holds a {type(checkpoint).__name__}; expected a state dict')
    converted = convert_official_state_dict(checkpoint)
    if strange := [key for key, value in converted.items() if not isinstance(value, Tensor)]:
        raise ValueError(f'{source} holds something else than tensors: {", ".join(map(str, strange))}')
    own = CEResNet(depth=depth).state_dict()
    # PyTorch before 0.4.1, which the authors may have used, kept no such counter; no output depends on it.
    missing = [key for key in own if key not in converted and not key.endswith('num_batches_tracked')]
    unexpected = [key for key in converted if key not in own]
    reshaped = [
        f'{key} {tuple(converted[key].shape)} for {tuple(own[key].shape)}'
        for key in own
        if key in converted and converted[key].shape != own[key].shape
    ]
    if missing or unexpected or reshaped:
        raise ValueError(
            f'{source} is not a checkpoint of the released CE-ResNet-{depth}. Missing ({len(missing)}): '
            f'{", ".join(missing) or "none"}. Unexpected ({len(unexpected)}): {", ".join(unexpected) or "none"}. '
            f'Of another shape ({len(reshaped)}): {", ".join(reshaped) or "none"}'
        )
    meta = dict(source=source.name, source_sha256=sha256(source), converter=f'mmdet_ce {__version__}')
    write_checkpoint(dict(state_dict={key: t.detach().clone() for key, t in converted.items()}, meta=meta), destination)
    return len(converted)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path, help="the authors' file")
    parser.add_argument(
        'destination', type=Path, nargs='?', default=Path('checkpoints/ce-resnet50_imagenet.pth'),
        help='where to write the converted file (default: %(default)s, which the configs name)',
    )  # fmt: skip
    parser.add_argument('--depth', type=int, default=50, help='depth of the network (default: %(default)s)')
    args = parser.parse_args()
    try:
        count = convert(args.source, args.destination, args.depth)
    except (CheckpointFileError, ValueError, KeyError) as error:
        sys.exit(f'error: {error.args[0]}')
    print(f'{args.destination}: {count} tensors, 0 missing, 0 unexpected; the classifier was left out')


if __name__ == '__main__':
    main()
