"""Train rows of configs/ce and their plain counterparts on COCO, test them, and publish their AP.

    python tools/benchmark_coco.py --data-root data/coco --gpus 8
    python tools/benchmark_coco.py --publish

Checks data and weights, measures 20 iterations of each row, prints the plan with its GPU hours, then trains and tests.
The same command continues after a kill. docs/coco.md says more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from command_line import console, exit_on, exit_on_problems, make_folder

from coco.checks import annotation_file, config_problems, data_problems, machine_problems
from coco.plan import Job, measure, plan_table
from coco.publish import publish
from coco.results import add_result, read_results, results_table
from coco.rows import CONFIGS, DEFAULT, all_rows, plain_config, plain_name
from launch import Launch
from trainings import Training, test, train

from mmdet_ce.checkpoints import whole_file

EPOCHS = {'1x': (12, [8, 11]), '2x': (24, [16, 22])}  # mmdet's schedules: epochs, and where the learning rate drops


def config_options(args: argparse.Namespace, seed: int) -> list[str]:
    """Return the options that every training has."""
    root = args.data_root
    options = [f'{split}_dataloader.dataset.data_root={root}/' for split in ('train', 'val', 'test')]
    options += [f'{split}_evaluator.ann_file={annotation_file(root, "val2017")}' for split in ('val', 'test')]
    options.append('auto_scale_lr.enable=True')  # the learning rates are for 16 images a step
    if args.schedule:
        epochs, milestones = EPOCHS[args.schedule]
        options += [f'train_cfg.max_epochs={epochs}', f'param_scheduler.1.end={epochs}']
        options += [f'param_scheduler.1.milestones={milestones}'.replace(' ', '')]
    return [*options, *args.cfg_options, f'randomness.seed={seed}']


def make_jobs(args: argparse.Namespace, launch: Launch) -> list[Job]:
    """Return the jobs, each plain counterpart before the first of its rows; write the plain configs."""
    configs = {}
    for row in args.rows:
        path = args.out_dir / 'plain_configs' / f'{plain_name(row)}.py'
        with whole_file(path) as file:
            file.write(plain_config(row).pretty_text.encode())
        configs[plain_name(row)] = path
        configs[row] = CONFIGS / f'{row}.py'

    def job(name: str, seed: int) -> Job:
        folder = args.out_dir / name / f'seed_{seed}'
        data = 'a subset of COCO' if args.subset else ''
        training = Training(str(configs[name]), folder, config_options(args, seed), launch, data)
        return Job(name, seed, training, name not in args.rows)

    return [job(name, seed) for seed in args.seeds for name in configs]


def trial_reasons(args: argparse.Namespace, job: Job) -> list[str]:
    """Return why the AP of a job is not that of its row on COCO; nothing if it is."""
    own = Training(job.training.config, job.training.work_dir, []).epochs
    return [
        *([job.training.data] if job.training.data else []),
        *([f'--schedule {args.schedule}'] if job.training.epochs != own and args.schedule else []),
        *(['--cfg-options'] if args.cfg_options else []),
    ]


def check(args: argparse.Namespace, jobs: list[Job]) -> int:
    """Exit with a line for each problem, if there is one; return the number of training images with objects."""
    print('checking data and weights', flush=True)
    trainings = {job.name: job.training for job in jobs}.values()  # one of each config: seeds do not matter here
    exit_on_problems([problem for one in trainings if (problem := one.config_problem())])
    problems = config_problems([one.read_config() for one in trainings])
    problems, images = data_problems(args.data_root, args.subset, problems)
    problems += machine_problems(jobs[0].training.launch)
    problems += [problem for job in jobs if (problem := job.training.folder_problem())]
    exit_on_problems(problems)
    return images


def run(args: argparse.Namespace) -> None:
    """Check, measure, print the plan, and run it."""
    launch = Launch(args.launcher, args.gpus, args.partition)
    make_folder(args.out_dir)
    jobs = make_jobs(args, launch)
    path = args.out_dir / 'results.json'
    with exit_on(ValueError):
        read_results(path)
    images = check(args, jobs)
    seconds = {}
    for job in jobs:
        if job.name not in seconds:
            with exit_on(ValueError):
                seconds[job.name] = measure(job, args.out_dir / job.name / 'measured')
    console().print(plan_table(jobs, seconds, images))
    if args.dry_run:
        return
    for job in jobs:
        if not job.training.is_done():
            print(f'{job.name}, seed {job.seed}: its output goes to {job.training.log}', flush=True)
        record = train(job.training, test)
        add_result(path, job, record, trial_reasons(args, job))
        print(f'{job.name}, seed {job.seed}: {record["metrics"]}', flush=True)
    console().print(results_table(read_results(path), jobs))
    print(f'written: {path}; --publish writes it into the documents')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-root', type=Path, default=Path('data/coco'), help='COCO 2017 (default: %(default)s)')
    parser.add_argument('--gpus', type=int, default=8, help='0 trains on the CPU (default: %(default)s)')
    parser.add_argument('--launcher', choices=['pytorch', 'slurm'], default='pytorch', help='(default: %(default)s)')
    parser.add_argument('--partition', default='', help="Slurm's partition")
    parser.add_argument('--rows', nargs='+', default=DEFAULT, help=f'names, or all (default: {" ".join(DEFAULT)})')
    parser.add_argument('--schedule', choices=[*EPOCHS], help="12 or 24 epochs (default: each row's own)")
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='(default: 0)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='of every training; a trial')
    parser.add_argument('--subset', action='store_true', help='the data is a part of COCO; a trial')
    parser.add_argument('--dry-run', action='store_true', help='end after the plan')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/coco'), help='(default: %(default)s)')
    parser.add_argument('--publish', action='store_true', help='write the results of --out-dir into the documents')
    parser.add_argument('--into', type=Path, help='write into copies of the documents in this folder, trials too')
    args = parser.parse_args()
    rows = [Path(name).stem for name in args.rows]
    args.rows = list(dict.fromkeys(all_rows() if rows == ['all'] else rows))
    if unknown := sorted(set(args.rows) - set(all_rows())):
        parser.error(f'--rows {" ".join(unknown)}: no such config in configs/ce; expected of {", ".join(all_rows())}')
    if args.gpus < 0:
        parser.error(f'--gpus must be 0 or more, got {args.gpus}')
    if args.launcher == 'slurm' and not (args.partition and args.gpus):
        parser.error('--launcher slurm needs --partition NAME and at least one GPU')
    if args.into and not args.publish:
        parser.error('--into goes with --publish')
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.launcher == 'pytorch' and args.gpus < 2:
        args.launcher = 'none'
    return args


def main() -> None:
    """Command line."""
    args = parse_args()
    if not args.publish:
        return run(args)
    path = args.out_dir / 'results.json'
    with exit_on(ValueError, OSError):
        results = read_results(path)
        if not results:
            sys.exit(f'error: {path} not found, or without a result; run this tool without --publish first')
        print('written:', *publish(results, args.into))


if __name__ == '__main__':
    main()
