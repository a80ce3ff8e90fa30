"""Study when channels become inhibited, and what CE does about it: small networks on images in folders by class.

    python tools/analysis_tools/study_inhibition.py TRAIN_FOLDER TEST_FOLDER --out-dir work_dirs/inhibition

Trains each network with each weight decay and seed. A training that is finished in the output folder is not run again,
so an interrupted study continues, and several commands with the same settings fill one folder. The table, results.json
and inhibition.png show all that the folder holds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import exit_on, flush_denormals, make_folder

import torch
from inhibition_report import report
from inhibition_training import Case, Settings, build_ce, classes_of, train
from provenance import processor
from trainings import write_json

from mmdet_ce import __version__

NETWORKS = ['plain', 'ce-t3', 'ce-t5', 'ce-t8', 'ce-t12', 'bd-t3', 'bd-t8', 'ir']
WEIGHT_DECAYS = [0.0, 5e-4, 2e-3]


def result_file(case: Case, out_dir: Path) -> Path:
    """Return where the result of a training stands."""
    return out_dir / f'{case.network}_wd{case.weight_decay:g}_seed{case.seed}.json'


def run(case: Case, settings: Settings, out_dir: Path) -> str:
    """Train one case in a process of its own, on one thread; write its result; return a line about it."""
    torch.set_num_threads(1)
    flush_denormals()
    environment = dict(machine=processor(), torch=torch.__version__, mmdet_ce=__version__)
    result = dict(case=case._asdict(), settings=settings._asdict(), environment=environment, **train(case, settings))
    write_json(result_file(case, out_dir), result)
    return f'{", ".join(map(str, case))}: accuracy {result["accuracy"]:.3f}, inhibited {result["inhibited"]:.1%}'


def end_with_parent() -> None:
    """End this worker when the process that started it ends, however it does: else it would train on, and stay."""

    def wait() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_all(cases: list[Case], settings: Settings, out_dir: Path, jobs: int) -> Iterator[str]:
    """Train all cases, several at a time; iterate over the lines about them as they end."""
    if jobs == 1:
        yield from (run(case, settings, out_dir) for case in cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context('spawn'), initializer=end_with_parent) as pool:
        for training in as_completed([pool.submit(run, case, settings, out_dir) for case in cases]):
            yield training.result()


def finished(out_dir: Path, settings: Settings) -> dict[Case, dict[str, Any]]:
    """Return the results that the folder holds.

    Raises:
        ValueError: If one of them was made with other settings, or is damaged.
    """
    results = {}
    for path in sorted(out_dir.glob('*_wd*_seed*.json')):
        try:
            result = json.loads(path.read_text())
            case, others = Case(**result['case']), Settings(**result['settings'])
            (result['environment'], result['history'], result['accuracy'])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f'{path} is no result of this tool ({type(error).__name__}: {error}); remove it, or name another '
                '--out-dir'
            ) from None
        if others != settings:
            raise ValueError(f'{path} was trained with {others}, not with {settings}; name another --out-dir')
        results[case] = result
    return results


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('train', type=Path, help='the training images: a folder with a folder for each class')
    parser.add_argument('test', type=Path, help='the images to measure with: the same')
    parser.add_argument(
        '--networks', nargs='+', default=NETWORKS,
        help='plain; ce-tT, with T Newton steps; bd-tT or ir, one branch alone (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument('--weight-decays', nargs='+', type=float, default=WEIGHT_DECAYS, help='(default: %(default)s)')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='(default: %(default)s)')
    parser.add_argument('--size', type=int, default=16, help='height and width in pixels (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=160, help='(default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=64, help='(default: %(default)s)')
    parser.add_argument('--learning-rate', type=float, default=0.2, help='(default: %(default)s)')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='trainings at a time (default: the cores)')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/inhibition'), help='(default: %(default)s)')
    args = parser.parse_args()
    args.seeds = list(dict.fromkeys(args.seeds))
    for name in ('seeds', 'weight_decays', 'epochs', 'batch_size', 'size', 'jobs', 'learning_rate'):
        values = getattr(args, name)
        lowest = 0 if name in ('seeds', 'weight_decays') else 1e-9
        if min(values if isinstance(values, list) else [values]) < lowest:
            parser.error(f'--{name.replace("_", "-")} must be {"at least" if lowest == 0 else "above"} 0, got {values}')
    return args


def main() -> None:
    """Command line."""
    args = parse_arguments()
    settings = Settings(
        str(args.train), str(args.test), args.size, args.epochs, args.batch_size, args.learning_rate
    )  # fmt: skip
    with exit_on(ValueError):
        classes_of(settings)
        for network in args.networks:
            build_ce(network, 16)
        done = finished(args.out_dir, settings)
    make_folder(args.out_dir)
    # Seeds outermost: a study that is ended early has every network.
    cases = [Case(name, decay, seed) for seed in args.seeds for decay in args.weight_decays for name in args.networks]
    cases = [case for case in cases if case not in done]
    with exit_on(ValueError):
        for index, line in enumerate(run_all(cases, settings, args.out_dir, args.jobs)):
            print(f'[{index + 1}/{len(cases)}] {line}', flush=True)
        results = finished(args.out_dir, settings)
    report(results, settings._asdict(), args.out_dir)


if __name__ == '__main__':
    main()
