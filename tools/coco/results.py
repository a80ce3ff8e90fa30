"""The file of results: by config and seed the AP, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

from command_line import mean_and_spread

from rich.table import Table
from scalars import seconds_per_iteration
from trainings import write_json

from .plan import Job
from .rows import plain_name

METRICS = {'box': 'coco/bbox_mAP', 'mask': 'coco/segm_mAP'}
STARTED = ('commit', 'uncommitted_changes', 'versions', 'command', 'date')  # as ``provenance`` returns them
Results = Any  # {name: {seed: {'metrics': {...}, 'trial': [...], ...}}}, as JSON holds it


def read_results(path: Path) -> Results:
    """Return the results in a file, {} if there is none.

    Raises:
        ValueError: If it is damaged or something else.
    """
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text())['results']
        for entries in results.values():
            for entry in entries.values():
                (entry['trial'], entry['metrics'].items, entry['hardware'], entry['starts'][-1])
                [start[key] for start in entry['starts'] for key in STARTED]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} holds no results of this tool ({type(error).__name__}: {error})') from None
    return results


def add_result(path: Path, job: Job, record: dict[str, Any], trial: list[str]) -> None:
    """Write a finished job into the file, beside what is there.

    Args:
        path: The file.
        job: The job.
        record: What ``train`` returned.
        trial: Why its AP is not that of the row on COCO; empty if it is.
    """
    results = read_results(path)
    results.setdefault(job.name, {})[str(job.seed)] = dict(
        metrics=record['metrics'],
        trial=trial,
        epochs=job.training.epochs,
        gpus=job.training.launch.gpus,
        seconds_per_iteration=seconds_per_iteration(job.training.work_dir),
        hardware=record['hardware'],
        starts=record['starts'],
    )
    write_json(path, dict(results=results))


def ap(results: Results, name: str) -> Optional[str]:
    """Return 'box / mask' AP of a config in percent, the mean and spread of its seeds; None if it has no result."""
    entries = list(results.get(name, {}).values())
    cells = []
    for metric in METRICS.values():
        values = [100 * entry['metrics'][metric] for entry in entries if metric in entry['metrics']]
        cells.append(mean_and_spread(values, 1) if values else '-')
    box, mask = cells
    return (box if mask == '-' else f'{box} / {mask}') if entries else None


def ap_beside_plain(results: Results, row: str) -> str:
    """Return a row's cell of the tables: its AP, the plain counterpart's, and whether they are a trial's."""
    own = ap(results, row)
    if own is None:
        return 'not run'
    plain = ap(results, plain_name(row))
    return f'{own} (plain {plain or "not run"})' + (' - a trial, not COCO' if trials(results, row) else '')


def trials(results: Results, row: str) -> list[str]:
    """Return why the AP of a row, or of its plain counterpart, is not that on COCO."""
    entries = [entry for name in (row, plain_name(row)) for entry in results.get(name, {}).values()]
    return list(dict.fromkeys(reason for entry in entries for reason in entry['trial']))


def origin(results: Results, name: str) -> str:
    """Return where the results of a config come from: those of its seeds that differ in it are named apart."""
    places: dict[str, list[str]] = {}
    for seed, entry in results[name].items():
        start, trial = entry['starts'][-1], ', '.join(entry['trial'])
        text = f'{start["date"]}, {entry["hardware"]}, {start["versions"]}, {_commits(entry)}: `{start["command"]}`'
        places.setdefault(text + (f' (a trial, not COCO: {trial})' if trial else ''), []).append(seed)
    return '; '.join(f'seed {", ".join(seeds)}: {text}' for text, seeds in places.items())


def _commits(entry: dict[str, Any]) -> str:
    """Name the commits that a training ran at: a continued one may have seen several."""
    changed = {True: ' with uncommitted changes', False: ''}
    commits = [f'commit {start["commit"][:9]}{changed[start["uncommitted_changes"]]}' for start in entry['starts']]
    return ', '.join(dict.fromkeys(commits))


def results_table(results: Results, jobs: list[Job]) -> Table:
    """Return the AP of what was run as a table."""
    table = Table(title='AP (box / mask)')
    for column in ('row', 'AP', 'plain counterpart', 'AP', 'a trial, because of'):
        table.add_column(column, overflow='fold')
    for row in dict.fromkeys(job.name for job in jobs if not job.is_plain):
        plain = plain_name(row)
        cells = (ap(results, row) or 'not run', plain, ap(results, plain) or 'not run')
        table.add_row(row, *cells, ', '.join(trials(results, row)))
    return table
