"""Draw docs/images/does_it_help.png from the output folder of tools/compare.py that holds the runs of that page.

python docs/images/draw_does_it_help.py RUNS
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

KINDS = {'plain': ('C0', 's'), 'CE, T = 3': ('C1', 'o'), 'squeeze-and-excitation': ('C2', '^')}
BLOOD_CELLS = {  # label: the run of each kind
    'scratch, 1e-3': ['plain-scratch-1e-3', 'ce-scratch-1e-3'],
    'own weights, norms frozen, 1e-3': ['plain-frozen-1e-3', 'ce-frozen-1e-3', 'se-frozen-1e-3'],
    'the same, norms and CE calibrated': ['plain-calibbnfrozen-1e-3', 'ce-calibbnfrozen-1e-3'],
    'own weights, norms train, 2e-3': ['plain-train-2e-3', 'ce-train-2e-3', 'se-train-2e-3'],
    'plain weights, identity start, norms frozen, 1e-3': [None, 'identity-normeval-1e-3'],
    'plain weights, identity start, norms train, 1e-3': [None, 'identity-over-plain-1e-3'],
    'plain weights, untrained CE, norms train, 2e-3': [None, 'ce-over-plain-2e-3'],
}
FACADES = {
    'own weights': ['fac-plain-train-1e-3', 'fac-ce-train-1e-3'],
    'plain weights,\nuntrained CE': [None, 'fac-ce-over-plain-1e-3'],
}


def scores(run, metric):
    """Return the AP in percent of each seed of a run."""
    files = sorted(run.glob('seed_*/result.json'))
    return [100 * json.loads(file.read_text())['metrics'][f'coco/{metric}_mAP'] for file in files]


def losses(run):
    """Return the mean training loss by epoch, over the seeds of a run."""
    by_epoch = {}
    for file in sorted(run.glob('seed_*/*/vis_data/scalars.json')):
        for record in map(json.loads, filter(str.strip, file.read_text().splitlines())):
            if 'loss' in record:
                by_epoch.setdefault(record['epoch'], []).append(record['loss'])
    return {epoch: statistics.mean(values) for epoch, values in by_epoch.items()}


def draw_scores(axis, folder, rows, title):
    """Draw a mark for each seed; ``rows`` are a label, the metric and the run of each kind."""
    seen = set()
    for row, (_, metric, runs) in enumerate(rows):
        for column, (run, (kind, (color, marker))) in enumerate(zip(runs, KINDS.items())):
            values = scores(folder / run, metric) if run else []
            label = kind if values and kind not in seen else None
            seen |= {kind} if values else set()
            axis.plot(values, [row + 0.2 * (column - 0.5)] * len(values), marker, color=color, label=label)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set(title=title, xlabel='AP in percent')
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def main():
    """Command line."""
    folder = Path(sys.argv[1])
    figure = Figure(figsize=(15, 4.4), layout='constrained')
    curves, cells, facades = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    for setting, style in (('frozen-1e-3', '--'), ('train-2e-3', '-')):
        for name, color in (('plain', 'C0'), ('ce', 'C1')):
            norms, rate = setting.split('-', 1)
            label = f'{name.replace("ce", "CE")}, norms {norms}, {rate}'
            by_epoch = losses(folder / f'{name}-{setting}')
            curves.plot(by_epoch.keys(), by_epoch.values(), style, color=color, marker='.', label=label)
    curves.set(title='Training loss, blood cells', xlabel='epoch', ylim=(0.2, 0.8))
    curves.grid(alpha=0.3)
    curves.legend(fontsize=8)
    rows = [(label, 'bbox', runs) for label, runs in BLOOD_CELLS.items()]
    draw_scores(cells, folder, rows, 'Box AP of each seed, blood cells')
    kinds = {'bbox': 'boxes', 'segm': 'masks'}
    rows = [(f'{label}, {kinds[metric]}', metric, runs) for metric in kinds for label, runs in FACADES.items()]
    draw_scores(facades, folder, rows, 'AP of each seed, facades')
    figure.savefig(Path(__file__).with_name('does_it_help.png'), dpi=75)


if __name__ == '__main__':
    main()
