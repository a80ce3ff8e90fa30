"""Make a checkpoint ready to share: weights alone, the file named by its hash.

As mmdet's tool of this name, but it also drops the texts that a framework would run as a config, and says in ``meta``
which CE the weights were trained with, by the name of the backbone: T, d and the position.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from pathlib import Path

import torch

from mmdet_ce import __version__
from mmdet_ce.checkpoints import AtomicLocalBackend, read_checkpoint

META = ('dataset_meta', 'epoch', 'iter', 'mmengine_version')


def publish(source: Path, destination: Path) -> Path:
    """Write the weights that a test would load; return the file's name: ``destination`` with a hash.

    Raises:
        ValueError: If there is no ``state_dict`` in it.
    """
    checkpoint = read_checkpoint(source)
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        raise ValueError(f"{source} has no 'state_dict'; expected a training's checkpoint, like epoch_12.pth")
    state_dict = checkpoint['state_dict']
    meta = {key: value for key, value in (checkpoint.get('meta') or {}).items() if key in META}
    modules = getattr(state_dict, '_metadata', {})
    meta['ce_cfg'] = {name: of['ce_cfg'] for name, of in modules.items() if 'ce_cfg' in of}
    meta['mmdet_ce_version'] = __version__
    file = io.BytesIO()
    torch.save(dict(state_dict=state_dict, meta=meta), file)
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    named = destination.with_name(f'{destination.stem}-{digest[:8]}.pth')
    AtomicLocalBackend().put(file.getvalue(), named)
    return named


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path, help='a checkpoint that a training wrote')
    parser.add_argument('destination', type=Path, help='the published file; -HASH is added to its name')
    args = parser.parse_args()
    try:
        named = publish(args.source, args.destination)
    except (OSError, ValueError) as error:
        sys.exit(f'error: {error}')
    print(f'written: {named}')


if __name__ == '__main__':
    main()
