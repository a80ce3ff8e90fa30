"""Read what trainings logged: losses, seconds an iteration, and the mAP of each validation."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, Optional


def training_records(work_dir: Path) -> list[dict[str, Any]]:
    """Return what a training logged of its iterations, in their order, over all of its starts."""
    records = {record['step']: record for record in _records(work_dir) if 'loss' in record}
    return [records[step] for step in sorted(records)]


def validations(work_dir: Path) -> dict[int, dict[str, float]]:
    """Return the mAPs of each validation of a training, like {'coco/bbox_mAP': 0.38}, by epoch."""
    found = {}
    for record in _records(work_dir):
        metrics = {key: value for key, value in record.items() if key.startswith('coco/') and key.endswith('_mAP')}
        if metrics:
            found[record['step']] = metrics
    return dict(sorted(found.items()))


def seconds_per_iteration(work_dir: Path) -> Optional[float]:
    """Return the median time of an iteration; None if too little was logged.

    The first epoch warms up, and is left out. Of a training of one epoch the first quarter of its records is.
    """
    records = training_records(work_dir)
    times = [record['time'] for record in records if record.get('epoch', 1) > 1]
    times = times or [record['time'] for record in records[len(records) // 4 :]]
    return statistics.median(times) if times else None


def _records(work_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of all scalars.json of a training. Folders are named by the time of a start."""
    lines = []
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # a kill may cut the last one off
                continue
    return lines
