"""Write the demo's data set: coloured shapes on textured backgrounds, with instance masks, in COCO format.

    python tools/make_shapes_dataset.py     writes data/shapes

Deterministic: the same arguments give the same images and annotations. Classes are told apart by outline alone (colour
and texture are random), shapes overlap, and annotations cover the visible part.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

CLASSES = ('disc', 'square', 'triangle', 'star')
MIN_VISIBLE = 0.7  # an instance of which less can be seen is left out of the image


def background(rng: np.random.RandomState, size: int) -> np.ndarray:
    """Return a (size, size, 3) uint8 texture: two colours, blended by smooth noise, with stripes and grain."""
    coarse = rng.rand(rng.randint(3, 9), rng.randint(3, 9)).astype(np.float32)
    blend = np.clip(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)
    angle, period = rng.uniform(0, math.pi), rng.uniform(5, 30)
    y, x = np.mgrid[:size, :size]
    stripes = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)
    low, high = rng.randint(20, 236, (2, 3))
    image = low + (high - low) * blend[..., None] + 14 * stripes[..., None] + rng.normal(0, 7, (size, size, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def outline(rng: np.random.RandomState, name: str, size: int) -> np.ndarray:
    """Return the (P, 2) float corners of one shape, of random place, size and orientation."""
    radius = rng.uniform(0.1, 0.24) * size
    centre = rng.uniform(0.8 * radius, size - 0.8 * radius, 2)
    count, radii = dict(disc=(48, [1]), square=(4, [1]), triangle=(3, [1]), star=(10, [1, 0.45]))[name]
    angles = rng.uniform(0, 2 * math.pi) + 2 * math.pi * np.arange(count) / count
    lengths = radius * np.resize(radii, count)
    return centre + lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def draw(rng: np.random.RandomState, size: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray, int]]]:
    """Draw one image; return it, (size, size, 3) uint8, and its instances: class, visible mask, whole area."""
    image = background(rng, size)
    instances: list[tuple[int, np.ndarray, int]] = []
    for _ in range(rng.randint(2, 7)):
        category = rng.randint(len(CLASSES))
        corners = outline(rng, CLASSES[category], size)
        fixed = np.round(corners * 16).astype(np.int32)  # 4 fractional bits, for smooth edges
        mask = np.zeros((size, size), np.uint8)
        cv2.fillPoly(mask, [fixed], 1, shift=4)
        visible = [(c, m & (1 - mask), area) for c, m, area in instances]
        if mask.sum() < 60 or any(m.sum() < MIN_VISIBLE * area for _, m, area in visible):
            continue
        instances = [*visible, (category, mask, int(mask.sum()))]
        # 90 levels or more from what it covers, in one channel at least: visible, whatever the colours
        under = image[mask > 0].mean(axis=0)
        colour = rng.randint(20, 236, 3)
        colour = np.where(np.abs(colour - under).max() < 90, 255 * (under < 128), colour)
        colour = colour + rng.normal(0, 9, (size, size, 3))
        alpha = cv2.GaussianBlur(mask.astype(np.float32), (3, 3), 0)[..., None]
        image = np.clip(image * (1 - alpha) + colour * alpha, 0, 255).astype(np.uint8)
    return image, instances


def write_split(folder: Path, name: str, count: int, size: int, seed: int) -> None:
    """Write ``count`` images and their annotation file."""
    (folder / name).mkdir(parents=True)
    rng = np.random.RandomState(seed)
    images = []
    annotations = []
    for image_id in range(1, count + 1):
        image, instances = draw(rng, size)
        file_name = f'{image_id:06d}.png'
        cv2.imwrite(str(folder / name / file_name), image)
        images.append(dict(id=image_id, file_name=file_name, width=size, height=size))
        for category, mask, _ in instances:
            runs = coco_mask.encode(np.asfortranarray(mask))  # exact, where polygons could not leave out a hole
            annotation = dict(
                id=len(annotations) + 1,
                image_id=image_id,
                category_id=category + 1,
                bbox=coco_mask.toBbox(runs).tolist(),
                area=int(coco_mask.area(runs)),
                iscrowd=0,
                segmentation=dict(size=runs['size'], counts=runs['counts'].decode()),
            )
            annotations.append(annotation)
    categories = [dict(id=i + 1, name=name, supercategory='shape') for i, name in enumerate(CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (folder / 'annotations').mkdir(exist_ok=True)
    (folder / 'annotations' / f'instances_{name}.json').write_text(json.dumps(content))


def make_dataset(folder: Path, train: int = 400, val: int = 80, size: int = 128) -> None:
    """Write the data set to ``folder``, whole or not at all.

    Raises:
        FileExistsError: If ``folder`` exists.
    """
    if folder.exists():
        raise FileExistsError(f'{folder} exists; remove it to draw the data set anew')
    scratch = folder.with_name(f'{folder.name}.{os.getpid()}.tmp')
    try:
        write_split(scratch, 'train', train, size, seed=0)
        write_split(scratch, 'val', val, size, seed=1)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == '__main__':
    make_dataset(Path('data/shapes'))
