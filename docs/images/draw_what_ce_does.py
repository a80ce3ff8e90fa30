"""Draw what one Channel Equilibrium layer of a trained detector does: docs/images/what_ce_does.png.

    python docs/images/draw_what_ce_does.py CONFIG CHECKPOINT

Three panels, measured on images of the config's test data set: the correlations of one group of channels before CE,
the same after CE, and the gate of each channel in each image. `make demo` leaves a checkpoint to draw from.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor

from mmdet_ce import ChannelEquilibrium


@torch.no_grad()
def measure(cfg: Config, checkpoint: str, layer: str, num_images: int) -> tuple[ChannelEquilibrium, Tensor, Tensor]:
    """Return a CE layer with its inputs and its outputs, (images, C, H, W), of the first test images."""
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint, map_location='cpu', strict=True)
    model.eval()
    cfg.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    ce, inputs, outputs = model.backbone.get_submodule(layer), [], []

    def record(_: ChannelEquilibrium, args: tuple, out: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(out.clone())  # the block adds its shortcut in place

    ce.register_forward_hook(record)
    for batch in islice(Runner.build_dataloader(cfg.test_dataloader), num_images):
        model.backbone(model.data_preprocessor(batch, False)['inputs'])
    return ce, torch.cat(inputs), torch.cat(outputs)


def correlations(x: Tensor, ce: ChannelEquilibrium, group: int) -> Tensor:
    """Return the correlations of the channels of one group over images and positions, (d, d)."""
    d = ce.group_size
    return torch.corrcoef(x[:, group * d : (group + 1) * d].transpose(0, 1).flatten(1).double())


def off_diagonal(correlation: Tensor) -> float:
    """Return the mean magnitude of the correlations of different channels."""
    d = len(correlation)
    return ((correlation.abs().sum() - d) / (d * (d - 1))).item()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--layer', default='layer3.0.ce', help='name of the CE layer (default: %(default)s)')
    parser.add_argument('--group', type=int, default=0, help='group of channels (default: %(default)s)')
    parser.add_argument('--num-images', type=int, default=80, help='(default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path(__file__).with_name('what_ce_does.png'))
    args = parser.parse_args()

    ce, x, out = measure(Config.fromfile(args.config), args.checkpoint, args.layer, args.num_images)
    with torch.no_grad():
        gate = ce.ir.fc2(ce.ir.norm(ce.ir.fc1(x.var(dim=(2, 3)))).relu()).sigmoid()  # (images, C)
        lambda_ = torch.sigmoid(ce.theta).item()
    first = args.group * ce.group_size
    gate = gate[:, first : first + ce.group_size]

    figure = Figure(figsize=(11, 3.7), layout='constrained')
    axes = figure.subplots(1, 3)
    colours = colormaps['RdBu_r'].with_extremes(bad='0.7')
    for axis, values, when in zip(axes, (x, out), ('before CE', 'after CE')):
        matrix = correlations(values, ce, args.group)
        shown = matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), torch.nan)  # the diagonal is always 1
        image = axis.imshow(shown, cmap=colours, vmin=-0.6, vmax=0.6)
        axis.set(title=f'{when}: mean |correlation| {off_diagonal(matrix):.2f}', xlabel='channel', ylabel='channel')
    figure.colorbar(image, ax=axes[:2], label='correlation of two channels', shrink=0.85)
    image = axes[2].imshow(gate, cmap='viridis', aspect='auto', interpolation='nearest')
    axes[2].set(title='gate of each channel in each image', xlabel='channel', ylabel='image')
    figure.colorbar(image, ax=axes[2], label='gate', shrink=0.85)
    figure.suptitle(f'CE(x) = {lambda_:.2f} P x + {1 - lambda_:.2f} (gate / s) x   ({args.layer}, {len(x)} images)')
    figure.savefig(args.out, dpi=110)
    print(f'{args.out}: mean |correlation| {off_diagonal(correlations(x, ce, args.group)):.3f} before, '
          f'{off_diagonal(correlations(out, ce, args.group)):.3f} after')  # fmt: skip


if __name__ == '__main__':
    main()
