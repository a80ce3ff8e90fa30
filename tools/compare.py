"""Train configs, each with several seeds, and compare them: a table of mAP, and a row for each training in a CSV file.

    python tools/compare.py mask-rcnn_r50-ce_fpn_1x_coco mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py --gpus 8
    python tools/compare.py --run ce CONFIG --run plain CONFIG model.backbone.ce_cfg=None --seeds 0 1 2

The same command continues after a stop: finished runs are skipped, interrupted runs resume.

The plain network is MMDetection's ResNet with its own defaults. From scratch they start the last norm of each block at
zero, which CE does not; there, add the other start under a name of its own: --run plain-nonzero CONFIG
model.backbone.ce_cfg=None model.backbone.zero_init_residual=False.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import exit_on_problems, read_config

from checks import find_problems
from mmengine.config import Config, DictAction

from mmdet_ce.environment import describe_versions

TOOLS = Path(__file__).resolve().parent
SECONDS_BETWEEN_LINES = 30  # that say how far a training is
PROGRESS = re.compile(r'(?:Epoch|Iter)\((train|test)\) +(\[.*\]) .*eta: (\S+(?: days?, \S+)?)')


@dataclass(frozen=True)
class Training:
    """One seed of a run, in a folder of its own; its config lies beside the folder."""

    name: str
    config_name: str
    options: list[str]
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


def load(name: str, options: list[str]) -> Config:
    """Return the config of a name, with options like KEY=VALUE."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='*', action=DictAction, default={})
    return read_config(name, parser.parse_args(['--options', *options]).options)


def train_and_test(training: Training, num_gpus: int) -> None:
    """Train and test, and write the result; resume a training that was interrupted."""
    folder = training.folder
    log = folder / 'output.txt'
    run_tool('train.py', [training.config, '--work-dir', folder, '--resume'], num_gpus, log)
    checkpoint = folder / Path((folder / 'last_checkpoint').read_text().strip()).name
    run_tool('test.py', [training.config, checkpoint, '--work-dir', folder / 'test'], num_gpus, log)
    figures = json.loads(sorted(folder.glob('test/*/*.json'))[-1].read_text())
    steps = [record for record in read_records(folder) if 'loss' in record]
    times = [record['time'] for record in steps]
    result = dict(
        run=training.name,
        config=training.config_name,
        options=shlex.join(training.options),
        seed=training.seed,
        iterations=steps[-1]['step'],
        seconds_per_iteration=statistics.median(times[len(times) // 4 :]),  # the first quarter warms up
        environment=describe_environment(log),
        metrics={name: value for name, value in figures.items() if name not in ('data_time', 'time')},
    )
    training.result.write_text(json.dumps(result, indent=1))


def run_tool(name: str, arguments: list[Any], num_gpus: int, log: Path) -> None:
    """Run tools/<name>, append its output to a file and say how far it is; exit if it fails."""
    command = [sys.executable, '-W', 'ignore']
    if num_gpus > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={num_gpus}']
        arguments = [*arguments, '--launcher', 'pytorch']
    command += map(str, [TOOLS / name, *arguments])
    with open(log, 'a') as output:
        start = output.tell()
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_BETWEEN_LINES)
            print_progress(log.read_text(errors='replace')[start:])
    except KeyboardInterrupt:
        process.wait()  # the terminal has interrupted it as well
        raise
    finally:
        process.terminate()
    if process.returncode:
        print(*log.read_text(errors='replace').splitlines()[-20:], sep='\n', file=sys.stderr)
        sys.exit(f'error: {shlex.join(command)} failed; its whole output: {log}')


def print_progress(output: str) -> None:
    """Print the epoch and iteration that a tool printed last, and the time left."""
    lines = PROGRESS.findall(output)
    if lines:
        print('  {}: {}, {} left'.format(*lines[-1]), flush=True)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return what a training logged, over all starts."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))  # in folders named by the time of the start
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.endswith('}')]


def describe_environment(log: Path) -> str:
    """Return versions and hardware: the GPUs that a training's log names, else this machine's processor."""
    hardware = sorted(set(re.findall(r'^ +(GPU [\d,]+: .+)$', log.read_text(errors='replace'), flags=re.M)))
    return f'{describe_versions()}; {", ".join(hardware) or processor()}, {os.cpu_count()} cores'


def processor() -> str:
    """Return the name of this machine's processor."""
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.+)', info.read_text()) if info.is_file() else []
    return names[0] if names else platform.machine()


def write_csv(results: list[dict[str, Any]], path: Path) -> None:
    """Write a row for each training, with all figures of its test."""
    rows = [{**result, **result['metrics']} for result in results]
    columns = dict.fromkeys(column for row in rows for column in row if column != 'metrics')
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)


def table(results: list[dict[str, Any]]) -> str:
    """Return the mAPs in Markdown, or all figures where none is an mAP: mean and standard deviation over the seeds."""
    figures = dict.fromkeys(figure for result in results for figure in result['metrics'])
    figures = [name for name in figures if name.endswith(('mAP', 'mAP_50'))] or list(figures)
    lines = [f'| | {" | ".join(figures)} | seconds an iteration |', '| --- ' * (len(figures) + 2) + '|']
    for run in dict.fromkeys(result['run'] for result in results):
        seeds = [result for result in results if result['run'] == run]
        cells = [[seed['metrics'][name] for seed in seeds if name in seed['metrics']] for name in figures]
        cells.append([seed['seconds_per_iteration'] for seed in seeds])
        lines.append(f'| {run} | {" | ".join(map(mean_and_spread, cells))} |')
    seeds = sorted({result['seed'] for result in results})
    lines += ['', f'Seeds {", ".join(map(str, seeds))}; mean ± standard deviation.', '']
    return '\n'.join([*lines, *sorted({result['environment'] for result in results}), ''])


def mean_and_spread(values: list[float]) -> str:
    """Return the mean of values, and where there are several their standard deviation."""
    spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.3f}{spread}' if values else '-'


def parse_args() -> argparse.Namespace:
    """Read the command line; ``runs`` has the config and the options of each run by its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='*', help='paths, listed names, or mmdet::FOLDER/NAME.py')
    parser.add_argument(
        '--run', nargs='+', action='append', default=[], metavar='ARG',
        help='NAME CONFIG [KEY=VALUE ...]: a config with a name and options of its own',
    )  # fmt: skip
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='(default: 0)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='options of every training')
    parser.add_argument('--gpus', type=int, default=1, help='of each training (default: 1, or the CPU)')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/compare'), help='(default: %(default)s)')
    args = parser.parse_args()
    args.run = [*([Path(config).stem, config] for config in args.configs), *args.run]
    args.runs = {run[0]: run[1:] for run in args.run}
    if not args.runs or len(args.runs) < len(args.run) or not all(args.runs.values()):
        parser.error('expected a config or more, each with a name of its own; --run NAME CONFIG gives names')
    options = [option for _, *options in args.runs.values() for option in options] + args.cfg_options
    if wrong := [option for option in options if '=' not in option]:
        parser.error(f'expected KEY=VALUE, got {" ".join(wrong)}')
    return args


def plan(args: argparse.Namespace) -> list[Training]:
    """Return all trainings, the first seed of each run first; exit if there is a problem with one of them."""
    trainings = []
    problems = []
    for seed in dict.fromkeys(args.seeds):
        for name, (config, *options) in args.runs.items():
            options = [*args.cfg_options, *options]
            cfg = load(config, [*options, f'randomness.seed={seed}'])
            folder = args.out_dir / name / f'seed_{seed}'
            training = Training(name=name, config_name=config, options=options, seed=seed, cfg=cfg, folder=folder)
            trainings.append(training)
            if seed == args.seeds[0]:  # the seeds differ in nothing that is looked at
                problems += find_problems(cfg, ['train', 'val', 'test'])
            if training.config.is_file() and training.config.read_text() != cfg.pretty_text:
                problems.append(f'{training.config} is another config; move it and its folder, or change --out-dir')
    exit_on_problems(list(dict.fromkeys(problems)))
    return trainings


def main() -> None:
    """Command line."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and end the training on the way
    args = parse_args()
    trainings = plan(args)
    results = []
    for index, training in enumerate(trainings):
        training.folder.mkdir(parents=True, exist_ok=True)
        training.config.write_text(training.cfg.pretty_text)
        if not training.result.is_file():
            print(f'{index + 1} of {len(trainings)}: {training.name}, seed {training.seed}; ', end='')
            print(f'its output goes to {training.folder / "output.txt"}', flush=True)
            train_and_test(training, args.gpus)
        results.append(json.loads(training.result.read_text()))
        write_csv(results, args.out_dir / 'results.csv')
    print(table(results), f'written: {args.out_dir / "results.csv"}', sep='\n')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\nstopped; the same command continues')
