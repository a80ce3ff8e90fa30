"""The tables and the chart of tools/benchmark_ce.py."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402


def report(rows: list[dict[str, Any]], out_dir: Path, environment: dict[str, Any]) -> None:
    """Print the tables; write results.json and benchmark.png. The first row of a comparison is its yardstick."""
    comparisons: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        comparisons.setdefault(row['comparison'], []).append(row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(environment)
    for title, group in comparisons.items():
        table = Table(title=title)
        on_gpu = group[0]['gpu_ms'] is not None
        for column in ('', 'median ms', 'quartiles', 'ratio', 'quartiles', 'saved MB', 'ratio'):
            table.add_column(column, justify='left' if not column else 'right')
        for column in ('peak ratio', 'GPU ms', 'ratio') if on_gpu else ():
            table.add_column(column, justify='right')
        first = group[0]
        for row in group:
            for key in ('bytes_saved', 'peak_bytes', 'gpu_ms'):
                row[f'{key}_ratio'] = row[key] / first[key] if first[key] else None
            table.add_row(
                row['candidate'],
                f'{row["median_ms"]:.2f}',
                '{:.1f}-{:.1f}'.format(*row['quartiles_ms']),
                f'{row["time_ratio"]:.3f}',
                '{:.2f}-{:.2f}'.format(*row['time_ratio_quartiles']),
                f'{row["bytes_saved"] / 1e6:.1f}' if row['bytes_saved'] else '-',
                f'{row["bytes_saved_ratio"]:.3f}' if row['bytes_saved_ratio'] else '-',
                *(gpu_columns(row) if on_gpu else ()),
            )
        console.print(table)
    blocks = [row['time_ratio'] for row in rows if row['candidate'] == 'this']
    summary = {}
    if blocks:
        summary['block_speedup_geometric_mean'] = 1 / statistics.geometric_mean(blocks)
        console.print(f'block: {summary["block_speedup_geometric_mean"]:.2f} times as fast as the released form')
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / 'results.json').write_text(json.dumps(dict(environment=environment, **summary, rows=rows), indent=1))
    draw(comparisons, out_dir / 'benchmark.png', environment)
    console.print(f'written: {out_dir / "results.json"}, {out_dir / "benchmark.png"}')


def gpu_columns(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the columns that only a GPU has."""
    return f'{row["peak_bytes_ratio"]:.3f}', f'{row["gpu_ms"]:.2f}', f'{row["gpu_ms_ratio"]:.3f}'


def draw(comparisons: dict[str, list[dict[str, Any]]], path: Path, environment: dict[str, Any]) -> None:
    """Draw the medians as bars, with their quartiles."""
    heights = [len(group) + 1 for group in comparisons.values()]
    figure, axes = plt.subplots(
        len(heights), figsize=(9, 0.42 * sum(heights) + 1), height_ratios=heights, layout='constrained', squeeze=False
    )
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
