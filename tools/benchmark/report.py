"""The tables and files of tools/benchmark_ce.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from command_line import console

from benchmark.chart import draw
from rich.table import Table
from trainings import write_json


def report(rows: list[dict[str, Any]], out_dir: Path, environment: dict[str, Any]) -> None:
    """Print the tables; write results.json and benchmark.png. The first row of a comparison is its yardstick."""
    comparisons: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        comparisons.setdefault(row['comparison'], []).append(row)
    console().print(environment)
    for title, group in comparisons.items():
        add_ratios(group)
        console().print(table_of(title, group))
    blocks = [row['time_ratio'] for row in rows if row['candidate'] == 'this']
    summary = {}
    if blocks:
        summary['block_speedup_geometric_mean'] = 1 / statistics.geometric_mean(blocks)
        console().print(f'block: {summary["block_speedup_geometric_mean"]:.2f} times as fast as the released form')
    write_json(out_dir / 'results.json', dict(environment=environment, **summary, rows=rows))
    draw(comparisons, out_dir / 'benchmark.png', environment)
    console().print(f'written: {out_dir / "results.json"}, {out_dir / "benchmark.png"}')


def add_ratios(group: list[dict[str, Any]]) -> None:
    """Add to each row what it takes over what the first row takes; None where the first has no such figure."""
    for row in group:
        for key in ('bytes_saved', 'peak_bytes', 'gpu_ms'):
            row[f'{key}_ratio'] = row[key] / group[0][key] if group[0][key] else None


def table_of(title: str, group: list[dict[str, Any]]) -> Table:
    """Return the table of one comparison; a GPU has more columns."""
    on_gpu = group[0]['gpu_ms'] is not None
    table = Table(title=title)
    for column in ('', 'median ms', 'quartiles', 'ratio', 'quartiles', 'saved MB', 'ratio'):
        table.add_column(column, justify='left' if not column else 'right')
    for column in ('peak ratio', 'GPU ms', 'ratio') if on_gpu else ():
        table.add_column(column, justify='right')
    for row in group:
        cells = [row['candidate'], f'{row["median_ms"]:.2f}', '{:.1f}-{:.1f}'.format(*row['quartiles_ms'])]
        cells += [f'{row["time_ratio"]:.3f}', '{:.2f}-{:.2f}'.format(*row['time_ratio_quartiles'])]
        cells.append(f'{row["bytes_saved"] / 1e6:.1f}' if row['bytes_saved'] else '-')
        cells.append(f'{row["bytes_saved_ratio"]:.3f}' if row['bytes_saved_ratio'] else '-')
        if on_gpu:
            cells += [f'{row["peak_bytes_ratio"]:.3f}', f'{row["gpu_ms"]:.2f}', f'{row["gpu_ms_ratio"]:.3f}']
        table.add_row(*cells)
    return table
