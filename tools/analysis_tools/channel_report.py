"""What analyze_channels.py prints and writes beside its figure."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from command_line import console

from channel_summary import GROUPS, Models, bottom_line
from rich.table import Table

from mmdet_ce.checkpoints import whole_file


def print_table(summary: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the summary, a row for each model and group of layers."""
    table = Table(
        title=f"Channels under {args.relative_threshold:.0%} of their layer's mean contribution, and under "
        f'{args.absolute_threshold:g}; entropy (1: all equal); mean of the quarter with the smallest gammas; for CE '
        'lambda, and off-diagonal energy before and after'
    )
    for column in ('', 'layers', 'relative', 'absolute', 'entropy', 'gamma', 'lambda', 'off-diagonal'):
        table.add_column(column, justify='left' if column in ('', 'layers') else 'right')
    for row in summary:
        gamma = row['low_gamma_contribution']
        cells = [row['model'], GROUPS[row['group']], f'{row["inhibited_relative"]:.1%}']
        cells += [f'{row["inhibited_absolute"]:.1%}', f'{row["entropy"]:.3f}', '' if gamma is None else f'{gamma:.2f}']
        if 'lambda' in row:
            cells += [f'{row["lambda"]:.3f}', f'{row["off_diagonal_before"]:.2f} > {row["off_diagonal_after"]:.2f}']
        table.add_row(*cells)
    console().print(table, bottom_line(summary), highlight=False)


def write_files(models: Models, summary: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write channels.csv, a row for each layer, and channels.json, which has each channel too."""
    rows = [
        dict(model=model, layer=name, **layer.measures(args.relative_threshold, args.absolute_threshold))
        for model, layers in models.items()
        for name, layer in layers.items()
    ]
    write_csv(rows, args.out_dir / 'channels.csv')
    for row in rows:
        layer = models[row['model']][row['layer']]
        row['contribution'] = layer.contribution.tolist()
        row['gamma'] = None if layer.gamma is None else layer.gamma.tolist()
    thresholds = dict(relative=args.relative_threshold, absolute=args.absolute_threshold)
    record = dict(models=args.model, num_images=args.num_images, thresholds=thresholds, summary=summary, layers=rows)
    with whole_file(args.out_dir / 'channels.json') as file:
        file.write(json.dumps(record).encode())


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write one row for each model and layer; cells of CE are empty where there is none."""
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
