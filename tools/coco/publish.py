"""Write the AP columns of the documents from the file of results, and from nothing else."""

from __future__ import annotations

import contextlib
import re
import statistics
from pathlib import Path
from typing import Optional

from mmdet_ce.checkpoints import whole_file

from .results import METRICS, Results, ap_beside_plain, origin, trials
from .rows import all_rows

ROOT = Path(__file__).resolve().parents[2]
TABLES, METAFILE, README = 'configs/ce/README.md', 'configs/ce/metafile.yml', 'README.md'
MARK = re.compile(r'(<!-- COCO AP[^\n]*-->\n).*?(?=\n\n)', flags=re.S)
NOT_RUN = 'COCO AP: not run.'
TASKS = {'box': 'Object Detection', 'mask': 'Instance Segmentation'}


def publish(results: Results, into: Optional[Path] = None) -> list[Path]:
    """Write the three documents, all of which are composed before one is written.

    Args:
        results: What ``read_results`` returned. A row that is not in it is written as not run.
        into: A folder for the documents, which may hold trials; it gets copies of those that it lacks. None for the
            repository.

    Returns:
        The files written.

    Raises:
        ValueError: If trials were to be written into the repository, or a document has no place for the results.
    """
    folder = into or ROOT
    in_repository = folder.resolve() == ROOT
    for row in all_rows() if in_repository else []:
        if reasons := trials(results, row):
            raise ValueError(
                f'the results of {row} are a trial ({", ".join(reasons)}), no AP on COCO; --into FOLDER writes them '
                'into copies of the documents'
            )
    texts = {}
    for name, write in ((TABLES, _tables), (METAFILE, _metafile), (README, _readme)):
        source = folder / name if (folder / name).is_file() else ROOT / name
        texts[folder / name] = write(source.read_text(), results)
    with contextlib.ExitStack() as files:  # each takes its place after all were written
        for path, text in texts.items():
            files.enter_context(whole_file(path)).write(text.encode())
    return list(texts)


def _tables(text: str, results: Results) -> str:
    """Exchange the last cell of each row, and the list of where the results come from."""
    lines = [f'- `{name}`: {origin(results, name)}' for name in sorted(results)]
    text = _exchange(text, '\n'.join(lines) or NOT_RUN, TABLES)
    for row in all_rows():
        cell = ap_beside_plain(results, row)
        text, count = re.subn(rf'^(\| \[`{re.escape(row)}`\].*\| )[^|\n]*( \|)$', rf'\g<1>{cell}\2', text, flags=re.M)
        if count != 1:
            raise ValueError(f'{TABLES} has {count} table rows for {row}, expected one')
    return text


def _metafile(text: str, results: Results) -> str:
    """Exchange the Results of each model, the last of its entries."""
    head, *models = re.split(r'(?=^  - Name: \S+_coco$)', text, flags=re.M)
    written = {}
    for model in models:
        row = model.splitlines()[0].split()[-1]
        written[row] = re.split(r'^    Results:\n', model, flags=re.M)[0].rstrip('\n') + '\n' + _metrics(results, row)
    if sorted(written) != all_rows():
        raise ValueError(f'{METAFILE} has models {sorted(written)}, expected one for each config of configs/ce')
    return head + '\n'.join(written.values())


def _metrics(results: Results, row: str) -> str:
    """Return the Results of a model in OpenMMLab's form, '' if there are none."""
    entries = list(results.get(row, {}).values())
    lines = []
    for name, metric in METRICS.items():
        values = [100 * entry['metrics'][metric] for entry in entries if metric in entry['metrics']]
        if values:
            data = 'a trial, not COCO' if trials(results, row) else 'COCO'
            lines += [f'      - Task: {TASKS[name]}', f'        Dataset: {data}', '        Metrics:']
            lines += [f'          {name} AP: {statistics.mean(values):.1f}']
    return '\n'.join(['    Results:', *lines, '']) if lines else ''


def _readme(text: str, results: Results) -> str:
    """Exchange the AP: one line, or a table with a column for each row."""
    cells = {row: ap_beside_plain(results, row) for row in all_rows() if row in results}
    if not cells:
        return _exchange(text, NOT_RUN, README)
    names = [f'`{row.replace("_coco", "")}`' for row in cells]
    lines = (['COCO AP', *names], ['---'] * (1 + len(cells)), ['box / mask', *cells.values()])
    return _exchange(text, '\n'.join(f'| {" | ".join(line)} |' for line in lines), README)


def _exchange(text: str, block: str, name: str) -> str:
    """Exchange what is between the mark of a document and the next empty line."""
    text, count = MARK.subn(lambda mark: mark[1] + block, text)
    if count != 1:
        raise ValueError(f'{name} has {count} marks <!-- COCO AP ... -->, expected one')
    return text
