"""Train several configs with several seeds and compare their COCO mAP: one table, two figures, mean and spread.

    python tools/compare_seeds.py --run plain PLAIN_CONFIG --run ce CE_CONFIG KEY=VALUE ... --seeds 0 1 2

Every training is ``tools/train.py`` in a folder of its own, NAME/seed_K in the output folder, with its validation's
metrics. One that is complete there is not run again, one that was killed continues after its newest checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

from command_line import console, exit_on_problems, make_folder, mean_and_spread

import torch
from matplotlib.figure import Figure
from rich.table import Table
from scalars import seconds_per_iteration
from training_curves import draw_curves
from trainings import Training, last_validation, train, write_json

from mmdet_ce import __version__


class Run(NamedTuple):
    """One of the things compared."""

    name: str
    config: str
    options: list[str]


def report(results: dict[str, list[dict[str, float]]], folders: dict[str, list[Path]], record: dict, out: Path) -> None:
    """Print the table; write results.json, comparison.png and curves.png.

    Args:
        results: The metrics of each seed, by the run's name.
        folders: The work directory of each seed, by the run's name.
        record: What results.json holds beside these, the seeds and the environment.
        out: The folder to write to.
    """
    metrics = list(dict.fromkeys(metric for runs in results.values() for run in runs for metric in run))
    seconds = {name: [seconds_per_iteration(folder) for folder in runs] for name, runs in folders.items()}
    table = Table(title=f'COCO mAP, mean ± standard deviation of seeds {", ".join(map(str, record["seeds"]))}')
    table.add_column('')
    for metric in metrics:
        table.add_column(metric[len('coco/') :], justify='right')
        table.add_column('each seed', justify='right')
    table.add_column('s/iteration', justify='right')
    for name, runs in results.items():
        cells = [cell for metric in metrics for cell in _cells([run[metric] for run in runs if metric in run])]
        table.add_row(name, *cells, _cells([value for value in seconds[name] if value is not None])[0])
    console().print(record['environment'], table)
    write_json(out / 'results.json', dict(**record, runs=results, seconds_per_iteration=seconds))
    draw(results, metrics, out / 'comparison.png')
    draw_curves(folders, out / 'curves.png')
    console().print(f'written: {out / "results.json"}, {out / "comparison.png"}, {out / "curves.png"}')


def _cells(values: list[float]) -> tuple[str, str]:
    """Return mean and spread of values, and the values."""
    if not values:
        return '-', '-'
    return mean_and_spread(values, 3), ' '.join(f'{value:.3f}' for value in values)


def draw(results: dict[str, list[dict[str, float]]], metrics: list[str], path: Path) -> None:
    """Draw each seed's mAP as a dot, their mean as a bar."""
    figure = Figure(figsize=(1 + 4 * len(metrics), 1.2 + 0.5 * len(results)), layout='constrained')
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for row, runs in enumerate(results.values()):
            values = [run[metric] for run in runs if metric in run]
            if not values:
                continue
            axis.plot(values, [row] * len(values), 'o', color='tab:blue', alpha=0.6, markeredgewidth=0)
            axis.plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color='0.2', linewidth=2)
        axis.set_xlabel(metric[len('coco/') :])
        axis.set_yticks(range(len(results)), list(results))
        axis.grid(axis='x', alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0, 0].set_ylim(len(results) - 0.5, -0.5)
    figure.suptitle('dots: seeds; bars: their mean', fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--run', nargs='+', action='append', required=True, metavar='ARG',
        help='NAME CONFIG [KEY=VALUE ...]: a config to train, with options of its own; once for each',
    )  # fmt: skip
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='(default: 0 1 2)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='options of every training')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/comparison'), help='(default: %(default)s)')
    args = parser.parse_args()
    for run in args.run:
        if len(run) < 2 or not Path(run[1]).is_file():
            parser.error(f'--run needs a name and a config file, got {" ".join(run)!r}')
    args.seeds = list(dict.fromkeys(args.seeds))
    runs = [Run(name, config, options) for name, config, *options in args.run]
    if len({run.name for run in runs}) < len(runs):
        parser.error('each --run needs a name of its own')

    def training(run: Run, seed: int) -> Training:
        options = [*args.cfg_options, *run.options, f'randomness.seed={seed}']
        return Training(run.config, args.out_dir / run.name / f'seed_{seed}', options)

    trainings = [(run.name, seed, training(run, seed)) for seed in args.seeds for run in runs]
    # All configs now, with the first seed: one that cannot be read would end it after hours of training.
    exit_on_problems([problem for _, _, one in trainings[: len(runs)] if (problem := one.config_problem())])
    make_folder(args.out_dir)
    exit_on_problems([problem for _, _, one in trainings if (problem := one.folder_problem())])

    results = {run.name: [] for run in runs}
    for name, seed, one in trainings:
        results[name].append(train(one, last_validation)['metrics'])
        print(f'{name}, seed {seed}: {results[name][-1]}', flush=True)
    folders = {name: [one.work_dir for other, _, one in trainings if other == name] for name in results}
    configs = {run.name: [run.config, *args.cfg_options, *run.options] for run in runs}
    environment = dict(torch=torch.__version__, mmdet_ce=__version__, configs=configs)
    report(results, folders, dict(environment=environment, seeds=args.seeds), args.out_dir)


if __name__ == '__main__':
    main()
