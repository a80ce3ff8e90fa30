"""The table and the figure of study_inhibition.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import console, mean_and_spread

import numpy as np
from inhibition_training import Case
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from trainings import write_json

from mmdet_ce.channel_analysis import RELATIVE_THRESHOLD

Results = dict  # of a Case, by a Case; see inhibition_training.train
# one colour a network, told apart with any kind of colour vision (Okabe and Ito), then black and grey
COLOURS = ['#000000', '#e69f00', '#56b4e9', '#009e73', '#0072b2', '#d55e00', '#cc79a7', '#999999']
MARKERS = 'osD^vP'


def report(results: Results, settings: dict[str, Any], out_dir: Path) -> None:
    """Print the table; write results.json and inhibition.png."""
    machines = []  # that the trainings ran on, with the versions there
    for result in results.values():
        if result['environment'] not in machines:
            machines.append(result['environment'])
    environment = dict(machines=machines, **settings)
    groups = group(results)
    table = Table(title='mean ± standard deviation of the seeds')
    for name in ('network', 'weight decay', 'seeds', 'accuracy', 'inhibited', 'by layer', 'dead gammas', 'ms a step'):
        table.add_column(name, justify='left' if name == 'network' else 'right')
    rows = []
    for (network, decay), runs in groups.items():
        layers = np.mean([run['inhibited_by_layer'] for run in runs], 0)
        step = np.mean([run['seconds_per_step'] for run in runs]) * 1000
        rows.append(dict(network=network, weight_decay=decay, seeds=len(runs), inhibited_by_layer=layers.tolist()))
        rows[-1].update(
            {key: [run[key] for run in runs] for key in ('accuracy', 'inhibited', 'dead_gammas', 'theta', 'diverged')}
        )
        if any(run['diverged'] for run in runs):
            table.add_row(network, f'{decay:g}', str(len(runs)), 'diverged', *['-'] * 4)
            continue
        percents = [spread(runs, key) for key in ('accuracy', 'inhibited')]
        dead = f'{np.mean([run["dead_gammas"] for run in runs]):.1%}'
        by_layer = ' '.join(f'{share:.0%}' for share in layers)
        table.add_row(network, f'{decay:g}', str(len(runs)), *percents, by_layer, dead, f'{step:.1f}')
    console().print(environment, table)
    console().print(f"inhibited: channels under {RELATIVE_THRESHOLD:.0%} of their layer's mean contribution")
    write_json(out_dir / 'results.json', dict(environment=environment, rows=rows))
    draw(groups, out_dir / 'inhibition.png')
    console().print(f'written: {out_dir / "results.json"}, {out_dir / "inhibition.png"}')


def network_order(name: str) -> tuple[int, int]:
    """Return a sort key of networks: plain first, then by kind and T."""
    kind, _, steps = name.partition('-t')
    return ('plain', 'ce', 'bd', 'ir').index(kind), int(steps or 0)


def group(results: Results) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Return the results of all seeds by network and weight decay, in the order of the table."""

    def order(case: Case) -> tuple:
        return case.weight_decay, network_order(case.network), case.seed

    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for case in sorted(results, key=order):
        groups.setdefault((case.network, case.weight_decay), []).append(results[case])
    return groups


def spread(runs: list[dict[str, Any]], key: str) -> str:
    """Return the mean of a share in percent, with its standard deviation where there are several runs."""
    return f'{mean_and_spread([100 * run[key] for run in runs], 1)} %'


def draw(groups: dict[tuple[str, float], list[dict[str, Any]]], path: Path) -> None:
    """Draw the figure: by epoch and by layer at the largest weight decay, and all of them against accuracy.

    Networks of which a training diverged are left out.
    """
    groups = {key: runs for key, runs in groups.items() if not any(run['diverged'] for run in runs)}
    if not groups:
        return
    networks = sorted({name for name, _ in groups}, key=network_order)
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(networks)}
    largest = max(decay for _, decay in groups)
    figure = Figure(figsize=(12, 8.5), layout='constrained')
    axes = figure.subplots(2, 2)
    shown = {name: groups[name, largest] for name in networks if (name, largest) in groups}
    for name, runs in shown.items():
        draw_history(axes[0, 0], runs, 'inhibited', name, colour[name])
        draw_history(axes[0, 1], runs, 'accuracy', name, colour[name])
    axes[0, 0].set(title=f'Inhibited channels, weight decay {largest:g}', xlabel='epoch', ylabel='%')
    axes[0, 1].set(title=f'Accuracy, weight decay {largest:g}', xlabel='epoch', ylabel='%')
    axes[0, 1].legend(fontsize=8)
    draw_final(axes[1, 0], groups, colour)
    draw_layers(axes[1, 1], shown, colour.__getitem__)
    axes[1, 1].set(title=f'Inhibited channels by layer, weight decay {largest:g}', ylabel='%')
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_history(axis: Axes, runs: list[dict[str, Any]], key: str, name: str, colour: str) -> None:
    """Draw a measure by epoch: the mean of the seeds, and the band from the lowest to the highest."""
    epochs = [entry['epoch'] for entry in runs[0]['history']]
    values = 100 * np.array([[entry[key] for entry in run['history']] for run in runs])
    axis.plot(epochs, values.mean(0), color=colour, label=name)
    axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def draw_final(axis: Axes, groups: dict[tuple[str, float], list[dict[str, Any]]], colour: dict[str, str]) -> None:
    """Draw the final share against the accuracy: a dot for each training, a marker for each weight decay."""
    decays = sorted({decay for _, decay in groups})
    for (name, decay), runs in groups.items():
        x, y = ([100 * run[key] for run in runs] for key in ('inhibited', 'accuracy'))
        axis.plot(x, y, MARKERS[decays.index(decay) % len(MARKERS)], color=colour[name], alpha=0.7, markeredgewidth=0)
    for decay, marker in zip(decays, MARKERS):
        axis.plot([], [], marker, color='0.5', label=f'weight decay {decay:g}')
    axis.legend(fontsize=8)
    axis.set(title='After the last epoch, each training', xlabel='inhibited channels (%)', ylabel='accuracy (%)')


def draw_layers(axis: Axes, shown: dict[str, list[dict[str, Any]]], colour_of: Callable[[str], str]) -> None:
    """Draw the share by layer: a bar for each network, the mean of its seeds."""
    width = 0.8 / max(1, len(shown))
    for index, (name, runs) in enumerate(shown.items()):
        layers = 100 * np.mean([run['inhibited_by_layer'] for run in runs], 0)
        places = np.arange(len(layers)) + (index - (len(shown) - 1) / 2) * width
        axis.bar(places, layers, width, color=colour_of(name))
    axis.set_xticks(range(len(layers)), [f'layer {i + 1}' for i in range(len(layers))])
