"""Run what only a GPU can show: the tests of the kernels, speed, the GPU suite, single operations, a profile.

A run that is cut loses nothing: facts.jsonl and report.md grow, the most valuable first. Without a network ``--wheels``
has addict, mmcv-lite, mmdet, mmengine, platformdirs, pycocotools, pytest, shapely, termcolor, terminaltables, yapf.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ('-m', 'pytest', '-q', '-p', 'no:warnings', '-p', 'no:cacheprovider', '--show-capture=no', '--tb=line')
FACTS = 'tools/dev_scripts/gpu_facts.py'
# mmcv-lite has no compiled operators; mmdet imports them all, and CE needs none
NO_OPERATORS = 'def __getattr__(name):\n    if name.startswith("__"):\n        raise AttributeError(name)\n'
NO_OPERATORS += '    def operator(*args, **kwargs):\n        raise NotImplementedError(name)\n    return operator\n'


class Step(NamedTuple):
    """A command, as long as it may take, and the form of the operator."""

    name: str
    seconds: int
    command: tuple[str, ...]
    form: str = 'auto'


STEPS = (
    Step('machine', 60, ('-m', 'mmdet_ce', 'env')),
    Step('kernels', 200, (*PYTEST, 'tests/test_kernels/test_triton_form.py')),
    Step('speed', 150, (FACTS, 'first')),
    Step('speed-dtypes', 150, (FACTS, 'dtypes')),
    Step('speed-modes', 150, (FACTS, 'modes')),
    Step('suite-triton', 120, (*PYTEST, 'tests/test_gpu'), 'triton'),
    Step('suite-torch', 90, (*PYTEST, 'tests/test_gpu'), 'torch'),
    Step('operations', 60, (FACTS, 'operations')),
    Step('profile', 90, (FACTS, 'profile')),
)


def run(step: Step, out_dir: Path, environment: dict[str, str]) -> bool:
    """Run a step, keep its facts, then how it ended with the last of what it said; return whether it passed."""
    print(f'gpu: {step.name}', flush=True)
    parallel = ['-n', '8'] if 'pytest' in step.command and importlib.util.find_spec('xdist') else []
    start, said = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, '-u', *step.command, *parallel], cwd=ROOT, env={**environment, 'MMDET_CE_KERNELS': step.form},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace', start_new_session=True,
    )  # fmt: skip
    stop = threading.Timer(step.seconds, os.killpg, (process.pid, signal.SIGKILL))
    stop.start()
    with process, (out_dir / 'facts.jsonl').open('a') as facts:
        for line in process.stdout:
            if line.startswith('{"fact"'):
                facts.write(line)
                facts.flush()
            elif line.strip():
                said.append(line.rstrip())
        process.wait()
        stop.cancel()
        result = dict(step=step.name, exit_status=process.returncode, seconds=round(time.monotonic() - start))
        facts.write(json.dumps(dict(fact='step', **result, said=said[-40:])) + '\n')
    return process.returncode == 0


def report(facts: list[dict]) -> str:
    """Return the facts as Markdown."""
    lines = ['# mmdet_ce on a GPU', '']
    for fact in facts:
        if fact['fact'] == 'step':
            lines += [f'## {fact["step"]}: ended with {fact["exit_status"]} after {fact["seconds"]} s']
            lines += ['', '```', *fact['said'], '```', '']
    lines += ['## A step of the backbone', '', '| case | plain ms | torch | Triton | host ms | MiB | first s |']
    lines += ['| --- ' * 7 + '|']
    for fact in facts:
        if fact['fact'] == 'speed' and 'ms' in fact:
            ms = fact['ms']
            ratios = [f'{ms[form] / ms["plain"]:.3f}' if form in ms else '' for form in ('torch', 'triton')]
            columns = (' / '.join(map(str, fact[name].values())) for name in ('host_ms', 'peak_mib', 'first_step_s'))
            lines.append('| ' + ' | '.join([fact['case'], str(ms['plain']), *ratios, *columns]) + ' |')
    others = [fact for fact in facts if fact['fact'] in ('operations', 'profile') or 'error' in fact]
    lines += ['', '## Operations, kernels and errors', '', *(f'    {json.dumps(fact)}' for fact in others)]
    return '\n'.join(lines) + '\n'


def install(wheels: Path, site: Path) -> None:
    """Install carried wheels into a folder of this run's own."""
    command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--target', str(site)]
    subprocess.run([*command, *map(str, sorted(wheels.glob('*.whl')))], check=True)
    if (site / 'mmcv').is_dir() and not list((site / 'mmcv').glob('_ext*')):
        (site / 'mmcv' / '_ext.py').write_text(NO_OPERATORS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [step.name for step in STEPS]
    parser.add_argument('--steps', nargs='+', choices=names, default=names, help='(default: all)')
    parser.add_argument('--wheels', type=Path, help='folder of wheels to install first, without a network')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/gpu'), help='(default: %(default)s)')
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit(f'gpu: error: torch {torch.__version__} sees no CUDA device; nothing was run')
    out_dir = args.out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / 'facts.jsonl').write_text('')
    if args.wheels is not None:
        install(args.wheels, out_dir / 'site')
    paths = (str(ROOT), str(out_dir / 'site'), os.environ.get('PYTHONPATH', ''))
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    failed = []
    for step in STEPS:
        if step.name in args.steps:
            failed += [] if run(step, out_dir, environment) else [step.name]
            facts = [json.loads(line) for line in (out_dir / 'facts.jsonl').read_text().splitlines()]
            (out_dir / 'report.md').write_text(report(facts))
    print(f'gpu: written: {out_dir / "report.md"}')
    if failed:
        sys.exit(f'gpu: error: {", ".join(failed)} did not pass')


if __name__ == '__main__':
    main()
