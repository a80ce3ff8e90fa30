"""Train configs, each with several seeds, and compare them: a table of mAP, results.json, a figure of curves.

    python tools/compare.py mask-rcnn_r50-ce_fpn_1x_coco mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py --gpus 8
    python tools/compare.py --run plain CONFIG KEY=VALUE --run ce CONFIG KEY=VALUE ... --seeds 0 1 2

The same command continues after a stop: what is tested is not run again, what was begun is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from command_line import exit_on_problems, read_config

from checks import find_problems
from child_process import TOOLS, run_logged
from matplotlib.figure import Figure
from mmengine.config import Config, DictAction
from mmengine.hub import get_config

from mmdet_ce.environment import describe_versions

ROOT = TOOLS.parent


class Training(NamedTuple):
    """One seed of a run, in a folder of its own; its config lies beside the folder."""

    name: str
    seed: int
    cfg: Config
    folder: Path

    @property
    def config(self) -> Path:
        """The config with all options, as it is trained."""
        return self.folder.with_suffix('.py')

    @property
    def result(self) -> Path:
        """What is there once it is trained and tested."""
        return self.folder / 'result.json'

    def records(self) -> list[dict[str, Any]]:
        """Return what was logged, over all starts."""
        files = sorted(self.folder.glob('*/vis_data/scalars.json'))  # in folders named by the time of the start
        return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.endswith('}')]


def load(name: str, options: list[str]) -> Config:
    """Return the config of a path, of a name under configs/, or of an installed package (mmdet::...)."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='*', action=DictAction, default={})
    options = parser.parse_args(['--options', *options]).options
    if '::' in name:
        cfg = get_config(name)
        cfg.merge_from_dict(options)
        return cfg
    shipped = [path for path in (ROOT / 'configs').glob('*/*.py') if path.stem == Path(name).stem]
    return read_config(shipped[0] if shipped and not Path(name).is_file() else name, options)


def command(args: argparse.Namespace, tool: str, training: Training, *positional: Any) -> list[str]:
    """Return the command line of a training or a test ('train' or 'test')."""
    if args.launcher == 'slurm':
        start = [TOOLS / f'slurm_{tool}.sh', args.partition, training.name, training.config, *positional]
    elif args.gpus > 1:
        start = [TOOLS / f'dist_{tool}.sh', training.config, *positional, args.gpus]
    else:
        start = [sys.executable, '-W', 'ignore', TOOLS / f'{tool}.py', training.config, *positional]
    return list(map(str, start))


def run(args: argparse.Namespace, training: Training) -> None:
    """Train and test, and write the result; continue what was begun."""
    folder, log = training.folder, training.folder / 'output.txt'
    print(f'{training.name}, seed {training.seed}: its output goes to {log}', flush=True)
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}'  # the scripts call python
    env = {**os.environ, 'PATH': path, 'GPUS': str(args.gpus)}
    place = [folder] if args.launcher == 'slurm' else []
    run_logged([*command(args, 'train', training, *place), '--work-dir', str(folder), '--resume'], log, env=env)
    checkpoint = folder / Path((folder / 'last_checkpoint').read_text().strip()).name
    run_logged([*command(args, 'test', training, checkpoint), '--work-dir', str(folder / 'test')], log, env=env)
    metrics = json.loads(sorted(folder.glob('test/*/*.json'))[-1].read_text())
    times = [record['time'] for record in training.records() if 'loss' in record]
    result = dict(
        metrics={key: value for key, value in metrics.items() if key.endswith(('mAP', 'mAP_50'))},
        seconds_per_iteration=statistics.median(times[len(times) // 4 :]),  # the first quarter warms up
        environment=environment(log),
    )
    training.result.write_text(json.dumps(result, indent=1))


def environment(log: Path) -> str:
    """Return commit, versions and hardware: the GPUs that a training's log names, else this machine's processor."""
    described = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty']
    commit = subprocess.run(described, capture_output=True, text=True).stdout.strip() or 'unknown'
    gpus = sorted(set(re.findall(r'^ +(GPU [\d,]+: .+)$', log.read_text(errors='replace'), flags=re.M)))
    return f'commit {commit}; {describe_versions()}; {", ".join(gpus) or processor()}'


def processor() -> str:
    """Name this machine's processor."""
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.+)', info.read_text()) if info.is_file() else []
    return f'{names[0] if names else platform.machine()}, {os.cpu_count()} cores'


def table(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return the results in Markdown: of each figure the mean and, of several seeds, the standard deviation."""
    runs = {name: list(seeds.values()) for name, seeds in results.items()}
    metrics = list(dict.fromkeys(metric for run in runs.values() for one in run for metric in one['metrics']))
    lines = ['| |', '| --- |']
    for column in [*(metric.rpartition('/')[2] for metric in metrics), 'seconds an iteration']:
        lines = [f'{lines[0]} {column} |', f'{lines[1]} --- |']
    for name, run in runs.items():
        cells = [[one['metrics'][metric] for one in run if metric in one['metrics']] for metric in metrics]
        cells = [*cells, [one['seconds_per_iteration'] for one in run]]
        lines.append(f'| {name} | {" | ".join(map(mean_and_spread, cells))} |')
    seeds = sorted({seed for seeds in results.values() for seed in seeds})
    lines += ['', f'Seeds {", ".join(map(str, seeds))}; mean ± standard deviation.', '']
    return '\n'.join([*lines, *sorted({one['environment'] for run in runs.values() for one in run}), ''])


def mean_and_spread(values: list[float]) -> str:
    """Return the mean of values, and where there are several their standard deviation."""
    spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.3f}{spread}' if values else '-'


def draw(trainings: list[Training], path: Path) -> None:
    """Draw loss and mAP over the epochs, a line for each training in the colour of its run."""
    curves: dict[str, list[tuple[str, dict[int, float]]]] = {}
    for training in trainings:
        records, losses = training.records(), {}
        for record in records:
            if 'loss' in record:
                losses.setdefault(record.get('epoch', record['step']), []).append(record['loss'])
        curves.setdefault('training loss', []).append(
            (training.name, {epoch: statistics.mean(values) for epoch, values in losses.items()})
        )
        for metric in dict.fromkeys(key for record in records for key in record if key.endswith('mAP')):
            points = {record['step']: record[metric] for record in records if metric in record}
            curves.setdefault(metric.rpartition('/')[2], []).append((training.name, points))
    figure = Figure(figsize=(5 * len(curves), 4), layout='constrained')
    colors = {name: f'C{index}' for index, name in enumerate(dict.fromkeys(training.name for training in trainings))}
    for axis, (title, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        seen = set()
        for name, points in lines:
            axis.plot(*zip(*sorted(points.items())), '.-', color=colors[name], label=None if name in seen else name)
            seen.add(name)
        axis.set(title=title, xlabel='epoch')
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    """Read the command line; ``runs`` has the config and the options of each run by its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='*', help='paths, names under configs/, or mmdet::FOLDER/NAME.py')
    parser.add_argument(
        '--run', nargs='+', action='append', default=[], metavar='ARG',
        help='NAME CONFIG [KEY=VALUE ...]: a config with a name and options of its own',
    )  # fmt: skip
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='(default: 0)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='options of every training')
    parser.add_argument('--gpus', type=int, default=1, help='of each training (default: 1, or the CPU)')
    parser.add_argument('--launcher', choices=['slurm'], help='default: none, or torch for several GPUs')
    parser.add_argument('--partition', default='', help="Slurm's partition")
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/compare'), help='(default: %(default)s)')
    args = parser.parse_args()
    args.run = [*([Path(config).stem, config] for config in args.configs), *args.run]
    args.runs = {run[0]: run[1:] for run in args.run}
    if not args.runs or len(args.runs) < len(args.run):
        parser.error('expected a config or more, each with a name of its own; --run NAME CONFIG gives names')
    options = [option for _, *options in args.runs.values() for option in options] + args.cfg_options
    if wrong := [option for option in options if '=' not in option]:
        parser.error(f'expected KEY=VALUE, got {" ".join(wrong)}')
    return args


def main() -> None:
    """Command line."""
    args = parse_args()
    trainings, problems = [], []
    for seed in dict.fromkeys(args.seeds):
        for name, (config, *options) in args.runs.items():
            cfg = load(config, [*args.cfg_options, *options, f'randomness.seed={seed}'])
            trainings.append(Training(name, seed, cfg, args.out_dir / name / f'seed_{seed}'))
    for training in trainings:
        problems += find_problems(training.cfg, ['train', 'val', 'test']) if training.seed == args.seeds[0] else []
        if training.config.is_file() and training.config.read_text() != training.cfg.pretty_text:
            problems.append(f'{training.config} is another config; move it and its folder, or name another --out-dir')
    exit_on_problems(list(dict.fromkeys(problems)))
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for training in trainings:
        training.folder.mkdir(parents=True, exist_ok=True)
        training.config.write_text(training.cfg.pretty_text)
        if not training.result.is_file():
            run(args, training)
        results.setdefault(training.name, {})[training.seed] = json.loads(training.result.read_text())
    (args.out_dir / 'results.json').write_text(json.dumps(results, indent=1))
    (args.out_dir / 'table.md').write_text(table(results))
    draw(trainings, args.out_dir / 'curves.png')
    print(table(results), f'written: table.md, results.json and curves.png in {args.out_dir}', sep='\n')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\nstopped; the same command continues')
