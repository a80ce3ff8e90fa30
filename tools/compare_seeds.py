"""Train several configs with several seeds and compare their COCO mAP: one table, one figure, mean and spread.

    python tools/compare_seeds.py --run plain PLAIN_CONFIG --run ce CE_CONFIG KEY=VALUE ... --seeds 0 1 2

Every training is ``tools/train.py`` in a folder of its own, NAME/seed_K in the output folder, with its validation's
metrics. One that is complete there is not run again, so an interrupted comparison continues.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

from command_line import console, exit_on, read_config, read_metrics

import torch
from child_process import run_logged, tool_command
from matplotlib.figure import Figure
from rich.table import Table

from mmdet_ce import __version__
from mmdet_ce.checkpoints import whole_file


class Run(NamedTuple):
    """One of the things compared."""

    name: str
    config: str
    options: list[str]


def train(run: Run, seed: int, options: list[str], work_dir: Path) -> dict[str, float]:
    """Train one config with one seed, unless that is done, and return the last validation's metrics."""
    arguments = [run.config, '--work-dir', work_dir, '--cfg-options', *options, *run.options]
    command = tool_command('train.py', *arguments, f'randomness.seed={seed}')
    # What decides the result: not run again where all of it is as it was.
    identity = dict(command=command[3:], config=read_config(run.config).pretty_text, version=__version__)
    done = work_dir / 'comparison.json'
    if done.is_file() and (saved := json.loads(done.read_text()))['identity'] == identity:
        return saved['metrics']
    log = work_dir / 'output.txt'
    log.unlink(missing_ok=True)
    run_logged(command, log)
    with exit_on(ValueError):
        metrics = {key: value for key, value in read_metrics(work_dir).items() if key.endswith('_mAP')}
    with whole_file(done) as file:
        file.write(json.dumps(dict(identity=identity, metrics=metrics)).encode())
    return metrics


def report(results: dict[str, list[dict[str, float]]], seeds: list[int], out_dir: Path, environment: dict) -> None:
    """Print the table; write results.json and comparison.png."""
    metrics = list(dict.fromkeys(metric for runs in results.values() for run in runs for metric in run))
    table = Table(title=f'COCO mAP, mean ± standard deviation of seeds {", ".join(map(str, seeds))}')
    table.add_column('')
    for metric in metrics:
        table.add_column(metric[len('coco/') :], justify='right')
        table.add_column('each seed', justify='right')
    for name, runs in results.items():
        cells = []
        for metric in metrics:
            values = [run[metric] for run in runs if metric in run]
            if not values:
                cells += ['-', '-']
                continue
            spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
            cells += [f'{statistics.mean(values):.3f}{spread}', ' '.join(f'{value:.3f}' for value in values)]
        table.add_row(name, *cells)
    console().print(environment, table)
    record = dict(environment=environment, seeds=seeds, runs=results)
    (out_dir / 'results.json').write_text(json.dumps(record, indent=1))
    draw(results, metrics, out_dir / 'comparison.png')
    console().print(f'written: {out_dir / "results.json"}, {out_dir / "comparison.png"}')


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
    runs = [Run(name, config, options) for name, config, *options in args.run]
    if len({run.name for run in runs}) < len(runs):
        parser.error('each --run needs a name of its own')
    for run in runs:
        read_config(run.config)  # a config that cannot be read ends it here, not after hours of training

    results = {run.name: [] for run in runs}
    for seed in args.seeds:
        for run in runs:
            results[run.name].append(train(run, seed, args.cfg_options, args.out_dir / run.name / f'seed_{seed}'))
            print(f'{run.name}, seed {seed}: {results[run.name][-1]}', flush=True)
    configs = {run.name: [run.config, *args.cfg_options, *run.options] for run in runs}
    environment = dict(torch=torch.__version__, mmdet_ce=__version__, configs=configs)
    report(results, args.seeds, args.out_dir, environment)


if __name__ == '__main__':
    main()
