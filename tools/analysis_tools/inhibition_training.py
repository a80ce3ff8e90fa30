"""The small networks of study_inhibition.py: what they are made of, their images, and one training."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_ce import ChannelEquilibrium
from mmdet_ce.backbones.ce_backbone import norm_ce
from mmdet_ce.channel_analysis import RELATIVE_THRESHOLD, analyze_channels, inhibited_share

CHANNELS = (32, 64, 128, 128)
STRIDES = (2, 2, 1, 1)
DEAD_GAMMA = 0.01
PADDING = 2  # pixels that a random crop shifts an image at most
# theta of a layer that has one branch alone: lambda is then 1, or 1e-13
BRANCH_THETA = {'bd': 30.0, 'ir': -30.0}
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp')


class Settings(NamedTuple):
    """What all trainings of a study share."""

    train: str
    test: str
    size: int  # height and width of the images, in pixels
    epochs: int
    batch_size: int
    learning_rate: float


class Case(NamedTuple):
    """One training of the study."""

    network: str  # plain, ce-tT, bd-tT or ir: T Newton steps, one branch alone
    weight_decay: float
    seed: int


class Images(NamedTuple):
    """Images of known classes."""

    pixels: Tensor  # (N, 3, size, size), float32, normalized
    labels: Tensor  # (N,)


class Layer(nn.Module):
    """Convolution, norm, CE and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, ce: Optional[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.ce = ce
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        return norm_ce(self.norm, self.ce, self.conv(x), relu=self.relu)


def build_ce(network: str, channels: int) -> Optional[nn.Module]:
    """Return the CE layer of a network by its name; None for the plain one.

    Raises:
        ValueError: If there is no network of that name.
    """
    if network == 'plain':
        return None
    match = re.fullmatch(r'(ce|bd)-t([1-9]\d*)|ir', network)
    if match is None:
        raise ValueError(f"no network {network!r}; expected 'plain', 'ir', or 'ce-tT' or 'bd-tT' with T Newton steps")
    ce = ChannelEquilibrium(channels, num_channels=16, num_iterations=int(match[2] or 1))
    if (branch := match[1] or 'ir') != 'ce':
        nn.init.constant_(ce.theta, BRANCH_THETA[branch])
        ce.theta.requires_grad_(False)
    return ce


def build_network(network: str, num_classes: int) -> nn.Sequential:
    """Return a network by its name: four layers, global average pooling, a classifier."""
    layers = [
        Layer(a, b, stride, build_ce(network, b)) for a, b, stride in zip((3, *CHANNELS), CHANNELS, STRIDES)
    ]  # fmt: skip
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], num_classes))
    return nn.Sequential(nn.Sequential(*layers), head)


def read_images(root: Path, size: int, classes: list[str]) -> Images:
    """Read the images of a folder that has a folder for each class.

    Raises:
        ValueError: If a class has no image, or an image cannot be read.
    """
    pixels, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (root / name).glob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise ValueError(f'{root / name} has no image; expected a folder of {", ".join(IMAGE_SUFFIXES)} files')
        for path in paths:
            image = mmcv.imread(path)
            if image is None:
                raise ValueError(f'{path} is no image that can be read; replace or remove it')
            pixels.append(mmcv.imresize(image, (size, size), interpolation='area'))
            labels.append(label)
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    return Images((stacked - 127.5) / 64, torch.tensor(labels))


def classes_of(settings: Settings) -> list[str]:
    """Return the names of the classes, which both folders have.

    Raises:
        ValueError: If there are not at least two, or the folders differ.
    """
    train, test = (
        sorted(path.name for path in Path(root).glob('*') if path.is_dir()) for root in (settings.train, settings.test)
    )
    if len(train) < 2 or train != test:
        raise ValueError(
            f'{settings.train} has {len(train)} folders and {settings.test} has {len(test)}; expected a folder of '
            'images for each of two or more classes, with the same names in both'
        )
    return train


@functools.lru_cache(maxsize=1)
def images_of(settings: Settings) -> tuple[list[Images], int]:
    """Return the training and the test images of a study, read once a process, and the number of classes."""
    classes = classes_of(settings)
    return [read_images(Path(root), settings.size, classes) for root in (settings.train, settings.test)], len(classes)


def augmented_batches(images: Images, batch_size: int, generator: torch.Generator) -> Iterator[Images]:
    """Iterate over one epoch in random order, with random flips and crops. The images that fill no batch are left."""
    count, _, size, _ = images.pixels.shape
    padded = F.pad(images.pixels, [PADDING] * 4)
    for batch in torch.randperm(count, generator=generator).split(batch_size):
        if len(batch) < batch_size:
            return
        top, left = torch.randint(2 * PADDING + 1, (2, batch_size), generator=generator)
        span = torch.arange(size)
        rows, columns = top[:, None] + span, left[:, None] + span  # (N, size)
        flip = torch.randint(2, (batch_size, 1), generator=generator).bool()
        columns = torch.where(flip, columns.flip(1), columns)
        crops = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (N, size, size, 3)
        yield Images(crops.permute(0, 3, 1, 2).contiguous(), images.labels[batch])


@torch.no_grad()
def measure(network: nn.Sequential, images: Images) -> dict[str, Any]:
    """Return the accuracy on the images, and what share of the channels is inhibited."""
    network.eval()
    hits = sum(
        int((network(pixels).argmax(1) == labels).sum())
        for pixels, labels in zip(images.pixels.split(500), images.labels.split(500))
    )
    statistics = analyze_channels(network[0], images.pixels.split(500)).values()
    contributions = [layer.contribution for layer in statistics if layer.gamma is not None]
    shares = [inhibited_share(c, RELATIVE_THRESHOLD * c.mean().item()) for c in contributions]
    gammas = torch.cat([layer.norm.weight.abs() for layer in network[0]])
    channels = [len(c) for c in contributions]
    return dict(
        accuracy=hits / len(images.labels),
        inhibited=float(np.average(shares, weights=channels)),
        inhibited_by_layer=shares,
        dead_gammas=(gammas < DEAD_GAMMA).double().mean().item(),
        theta=[layer.ce.theta.item() for layer in network[0] if layer.ce is not None],
    )


def train(case: Case, settings: Settings, num_measures: int = 16) -> dict[str, Any]:
    """Train one network: SGD with Nesterov momentum 0.9, cosine learning rate, weight decay on all that learns.

    Raises:
        ValueError: If there are fewer images than a batch has.

    Returns:
        The final measures; ``history``, the measures by epoch; ``seconds_per_step``, CPU time of training
        alone; and ``diverged``, whether loss or weights left the finite numbers, which ends the training.
    """
    (images, test), num_classes = images_of(settings)
    if len(images.labels) < settings.batch_size:
        raise ValueError(
            f'{settings.train} has {len(images.labels)} images; expected a batch of {settings.batch_size} at least, or '
            'set a smaller --batch-size'
        )
    torch.manual_seed(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    network = build_network(case.network, num_classes)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=case.weight_decay
    )
    total_steps = settings.epochs * (len(images.labels) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    history, seconds, diverged = [], 0.0, False
    for epoch in range(1, settings.epochs + 1):
        start = time.process_time()
        batches = augmented_batches(images, settings.batch_size, generator)
        finite = all(step(network, batch, optimizer, schedule) for batch in batches)
        diverged = not (finite and all(p.isfinite().all() for p in parameters))
        seconds += time.process_time() - start
        if epoch % max(1, settings.epochs // num_measures) == 0 or epoch == settings.epochs or diverged:
            history.append(dict(epoch=epoch, **measure(network, test)))
        if diverged:
            break
    return dict(**history[-1], history=history, seconds_per_step=seconds / max(1, total_steps), diverged=diverged)


def step(network: nn.Module, batch: Images, optimizer: torch.optim.Optimizer, schedule: Any) -> bool:
    """Take one step; return whether the loss was finite."""
    network.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(network(batch.pixels), batch.labels)
    loss.backward()
    optimizer.step()
    schedule.step()
    return loss.isfinite().item()
