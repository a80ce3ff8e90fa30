"""Study when channels become inhibited, and what CE does about it: small networks on images in folders by class.

    python tools/analysis_tools/study_inhibition.py TRAIN_FOLDER TEST_FOLDER --out-dir work_dirs/inhibition

Trains each network with each weight decay and seed, on one thread, and prints a table. An interrupted study continues.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.utils import scandir
from torch import Tensor, nn

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.channel_analysis import analyze_channels, inhibited_share

# CE with T Newton steps, or one branch of it alone: batch decorrelation (bd), instance reweighting (ir)
NETWORKS = ['plain', 'ce-t3', 'ce-t5', 'ce-t8', 'ce-t12', 'bd-t3', 'bd-t8', 'ir']
BRANCH_THETA = {'bd': 30.0, 'ir': -30.0}  # lambda is then 1, or 1e-13
CHANNELS, STRIDES = (32, 64, 128, 128), (2, 2, 1, 1)
SIZE, PADDING = 16, 2  # height and width of the images, and what a random crop shifts them, in pixels
BATCH_SIZE = 64

Images = Tuple[Tensor, Tensor]  # (N, 3, SIZE, SIZE), normalized; the classes, (N,)
Measures = Optional[Dict[str, Any]]  # None if the training diverged


def build_network(name: str, num_classes: int) -> nn.Sequential:
    """Return one of ``NETWORKS``: four layers of convolution, norm, CE and ReLU, average pooling, a classifier."""
    kind, _, num_iterations = name.partition('-t')
    layers = []
    for in_channels, channels, stride in zip((3, *CHANNELS), CHANNELS, STRIDES):
        ce = nn.Identity() if kind == 'plain' else ChannelEquilibrium(channels, num_iterations=int(num_iterations or 1))
        if kind in BRANCH_THETA:
            nn.init.constant_(ce.theta, BRANCH_THETA[kind])
            ce.theta.requires_grad_(False)
        conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        layers.append(nn.Sequential(conv, nn.BatchNorm2d(channels), ce, nn.ReLU()))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], num_classes))
    return nn.Sequential(nn.Sequential(*layers), head)


def read_images(root: Path, classes: list[str]) -> Images:
    """Read the images of a folder that has a folder for each class."""
    pixels, labels = [], []
    for label, folder in enumerate(root / name for name in classes):
        for name in sorted(scandir(folder, ('.jpg', '.jpeg', '.png', '.bmp'), case_sensitive=False)):
            pixels.append(mmcv.imresize(mmcv.imread(folder / name), (SIZE, SIZE), interpolation='area'))
            labels.append(label)
    if len(labels) < BATCH_SIZE:
        sys.exit(f'error: {root} has {len(labels)} images in folders by class; expected at least {BATCH_SIZE}')
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    return (stacked - 127.5) / 64, torch.tensor(labels)


def augmented_batches(images: Images, generator: torch.Generator) -> Iterator[Images]:
    """Iterate over one epoch in random order, with random flips and crops. The images that fill no batch are left."""
    pixels, labels = images
    padded = F.pad(pixels, [PADDING] * 4)
    for batch in torch.randperm(len(labels), generator=generator).split(BATCH_SIZE):
        if len(batch) < BATCH_SIZE:
            return
        top, left = torch.randint(2 * PADDING + 1, (2, BATCH_SIZE), generator=generator)
        rows, columns = top[:, None] + torch.arange(SIZE), left[:, None] + torch.arange(SIZE)  # (N, SIZE)
        flip = torch.randint(2, (BATCH_SIZE, 1), generator=generator).bool()
        columns = torch.where(flip, columns.flip(1), columns)
        crops = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (N, SIZE, SIZE, 3)
        yield crops.permute(0, 3, 1, 2).contiguous(), labels[batch]


@torch.no_grad()
def measure(network: nn.Sequential, images: Images) -> dict[str, Any]:
    """Return the accuracy on the images, and what share of the channels is inhibited."""
    pixels, labels = images
    network.eval()
    hits = torch.cat([network(chunk).argmax(1) for chunk in pixels.split(500)]) == labels
    layers = analyze_channels(network[0], pixels.split(500)).values()
    shares = [inhibited_share(layer.contribution) for layer in layers]
    inhibited = float(np.average(shares, weights=CHANNELS))
    return dict(accuracy=hits.double().mean().item(), inhibited=inhibited, inhibited_by_layer=shares)


def train(network: nn.Sequential, args: argparse.Namespace, decay: float, seed: int, data: list[Images]) -> Measures:
    """Train on the first images, measure on the second; end where loss or weights are not finite."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, args.learning_rate, momentum=0.9, nesterov=True, weight_decay=decay)
    num_steps = args.epochs * (len(data[0][1]) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(args.epochs):
        network.train()
        for pixels, labels in augmented_batches(data[0], generator):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(pixels), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            if not loss.isfinite():
                return None
        if not all(p.isfinite().all() for p in parameters):
            return None
    return measure(network, data[1])


def run(args: argparse.Namespace) -> dict[tuple[str, float], list[Measures]]:
    """Return the measures of all seeds by network and weight decay: read from the folder, or trained and written."""
    classes = sorted(path.name for path in args.train.iterdir() if path.is_dir())
    data = [read_images(folder, classes) for folder in (args.train, args.test)]
    settings = dict(train=str(args.train), test=str(args.test), epochs=args.epochs, learning_rate=args.learning_rate)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    # Seeds outermost: a study that is ended early has every network.
    for seed, decay, name in [(s, d, n) for s in args.seeds for d in args.weight_decays for n in args.networks]:
        path = args.out_dir / f'{name}_wd{decay:g}_seed{seed}.json'
        if not path.exists():
            torch.manual_seed(seed)
            network = build_network(name, len(classes))
            measures = train(network, args, decay, seed, data)
            path.with_suffix('.part').write_text(json.dumps(dict(settings=settings, measures=measures)))
            path.with_suffix('.part').replace(path)
            print(f'{path.stem}: {measures or "diverged"}', flush=True)
        result = json.loads(path.read_text())
        if result['settings'] != settings:
            sys.exit(f'error: {path} was trained with {result["settings"]}, not {settings}; name another --out-dir')
        results.setdefault((name, decay), []).append(result['measures'])
    return results


def table(results: dict[tuple[str, float], list[Measures]]) -> str:
    """Return a table in Markdown: mean and standard deviation over the seeds, in percent."""
    columns = [(key, decay) for key in ('inhibited', 'accuracy') for decay in dict.fromkeys(d for _, d in results)]
    lines = [f'| network | {" | ".join(f"{key}, weight decay {decay:g}" for key, decay in columns)} |']
    lines.append('| --- ' * (len(columns) + 1) + '|')
    for name in dict.fromkeys(name for name, _ in results):
        cells = [name]
        for key, decay in columns:
            seeds = results[name, decay]
            values = [100 * measures[key] for measures in seeds if measures]
            spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
            cells.append('diverged' if None in seeds else f'{statistics.mean(values):.1f}{spread}%')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('train', type=Path, help='the training images: a folder with a folder for each class')
    parser.add_argument('test', type=Path, help='the images to measure with: the same')
    parser.add_argument('--networks', nargs='+', default=NETWORKS, choices=NETWORKS)
    parser.add_argument('--weight-decays', nargs='+', type=float, default=[0.0, 5e-4, 2e-3])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=50)
    parser.add_argument('--learning-rate', type=float, default=0.3)
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/inhibition'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # gammas that decay below 1e-38 make a CPU slow
    print(table(run(args)))


if __name__ == '__main__':
    main()
