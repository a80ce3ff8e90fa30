"""Make a checkpoint ready to share: weights and version only, the file named by its hash.

As mmdet's tool of this name, but reading the checkpoint as data and writing it whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mmdet_ce import __version__
from mmdet_ce.checkpoints import CheckpointFileError, read_checkpoint, sha256, write_checkpoint

META = ('cfg', 'dataset_meta', 'epoch', 'iter', 'mmengine_version', 'mmdet_version')


def publish(source: Path, destination: Path) -> Path:
    """Write the weights of ``source`` and return the file's name: ``destination`` with the hash before its suffix.

    The weights are those that a test would load (with EMA: the averaged ones).

    Raises:
        CheckpointFileError: If ``source`` cannot be read or the file not be written.
        ValueError: If ``source`` holds no ``state_dict``.
    """
    if destination.is_dir() or not destination.stem:
        raise ValueError(f'{destination} is no name of a file; expected one like mask-rcnn_r50-ce_fpn_1x_coco.pth')
    checkpoint = read_checkpoint(source)
    state_dict = checkpoint.get('state_dict') if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError(f"{source} has no 'state_dict' with tensors; expected a training's, like epoch_12.pth")
    meta = checkpoint.get('meta') or {}
    published = dict(
        state_dict=state_dict,
        meta={**{key: meta[key] for key in META if key in meta}, 'mmdet_ce_version': __version__},
    )
    unnamed = destination.with_name(f'.{destination.stem}-unnamed.pth')
    try:
        write_checkpoint(published, unnamed)
        named = destination.with_name(f'{destination.stem}-{sha256(unnamed)[:8]}.pth')
        os.replace(unnamed, named)
    finally:
        unnamed.unlink(missing_ok=True)
    return named


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path, help='a checkpoint that a training wrote')
    parser.add_argument('destination', type=Path, help='the published file; -HASH is added to its name')
    args = parser.parse_args()
    try:
        named = publish(args.source, args.destination)
    except (CheckpointFileError, ValueError) as error:
        sys.exit(f'error: {error}')
    before, after = args.source.stat().st_size / 1e6, named.stat().st_size / 1e6
    print(f'{named}: {after:.1f} MB, {before:.1f} before')


if __name__ == '__main__':
    main()
