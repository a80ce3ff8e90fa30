"""The chart of tools/benchmark_ce.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(comparisons: dict[str, list[dict[str, Any]]], path: Path, environment: dict[str, Any]) -> None:
    """Draw the medians as bars, with their quartiles."""
    heights = [len(group) + 1 for group in comparisons.values()]
    figure = Figure(figsize=(9, 0.42 * sum(heights) + 1), layout='constrained')
    axes = figure.subplots(len(heights), gridspec_kw=dict(height_ratios=heights), squeeze=False)
    for axis, (title, group) in zip(axes[:, 0], comparisons.items()):
        medians = [row['median_ms'] for row in group]
        spread = [[abs(row['quartiles_ms'][k] - row['median_ms']) for row in group] for k in (0, 1)]
        colours = [
            '0.65' if 'released' in row['candidate'] or index == 0 else 'tab:blue' for index, row in enumerate(group)
        ]
        bars = axis.barh([row['candidate'] for row in group], medians, xerr=spread, color=colours, ecolor='0.3')
        axis.bar_label(bars, [f'{row["median_ms"]:.1f} ms, {row["time_ratio"]:.2f}x' for row in group], padding=6)
        axis.set_title(title, loc='left', fontsize=10)
        axis.set_xlim(0, 1.3 * max(medians))
        axis.invert_yaxis()
        axis.spines[['top', 'right']].set_visible(False)
    axes[-1, 0].set_xlabel('milliseconds, median and quartiles')
    figure.suptitle(f'{environment["hardware"]}, torch {environment["torch"]}, {environment["dtype"]}', fontsize=10)
    figure.savefig(path, dpi=120)
