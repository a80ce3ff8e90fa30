"""Create one of the environments that the tests run in: its pins and this package, editable, in a folder of its own.

Standard library only: it runs before anything is installed. Safe to repeat, and to interrupt: a finished set-up is
recognised by a stamp and costs nothing, an unfinished one is continued. mmcv's operators take many minutes to compile,
so the built wheel is kept in the user's cache directory and serves every later clone on the machine.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Environment(NamedTuple):
    """A set of versions that the tests run with."""

    python: tuple[int, int]
    requirements: Path
    venv: Path

    @property
    def interpreter(self) -> Path:
        """The environment's own Python."""
        return self.venv / 'bin' / 'python'

    @property
    def stamp(self) -> Path:
        """What a finished set-up leaves."""
        return self.venv / '.mmdet_ce_ready'

    def pinned(self, name: str) -> str:
        """Return the requirement line of ``name``."""
        for line in self.requirements.read_text().splitlines():
            if line.startswith(f'{name}=='):
                return line.strip()
        return fail(f'{self.requirements.name} pins no {name}')


ENVIRONMENTS = {
    'newest': Environment((3, 11), ROOT / 'requirements.txt', ROOT / '.venv'),
    'common': Environment((3, 8), ROOT / 'requirements-common.txt', ROOT / '.venv-common'),
}

# Two wheels of mmcv are interchangeable only if all of this agrees: the interpreter, the exact torch build, and
# whether the CUDA operators were compiled (mmcv decides by a visible GPU or FORCE_CUDA) and for which architectures.
BUILD_KEY_CODE = """
import os, sys, platform, torch
ops = 'cpu'
if torch.version.cuda and (torch.cuda.is_available() or os.getenv('FORCE_CUDA', '0') == '1'):
    archs = os.getenv('TORCH_CUDA_ARCH_LIST') or '_'.join(sorted({
        '%d.%d' % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}))
    ops = 'cu' + torch.version.cuda + '-sm' + archs
print('-'.join(['cp%d%d' % sys.version_info[:2], platform.machine(), 'torch' + torch.__version__, ops])
      .replace(' ', '_').replace(';', '_'))
"""

CHECK_CODE = """
import torch, mmcv.ops, mmengine, mmdet, pycocotools.mask, mmdet_ce
boxes = torch.tensor([[0., 0., 9., 9.], [1., 1., 9., 9.]])
assert len(mmcv.ops.nms(boxes, torch.tensor([.9, .8]), 0.5)[1]) == 1
print(f'torch {torch.__version__}, mmcv {mmcv.__version__}, mmengine {mmengine.__version__}, '
      f'mmdet {mmdet.__version__}, mmdet_ce {mmdet_ce.__version__}')
"""


def fail(message: str) -> None:
    """Stop with one clear line."""
    sys.exit(f'setup: error: {message}')


def say(message: str) -> None:
    """Print one line of progress at once."""
    print(f'setup: {message}', flush=True)


def check_machine(env: Environment) -> None:
    """Check everything that set-up needs from the machine, before anything is downloaded."""
    want = '.'.join(map(str, env.python))
    if sys.version_info[:2] != env.python:
        fail(
            f'Python {want} is needed, this is {sys.version.split()[0]} ({sys.executable}); '
            f'install it or name it: make PYTHON=/path/to/python{want} ...'
        )
    if importlib.util.find_spec('ensurepip') is None:
        fail(f'this Python has no venv module; install it (Debian and Ubuntu: apt install python{want}-venv)')
    compiler = (os.environ.get('CXX') or 'c++').split()[0]
    if shutil.which(compiler) is None:
        fail(
            f"no C++ compiler ('{compiler}' not found), and mmcv's operators are compiled; install one "
            '(Debian and Ubuntu: apt install g++) or set CXX'
        )
    if not Path(sysconfig.get_path('include'), 'Python.h').is_file():
        fail(
            f"Python's C headers (Python.h) are missing; install them (Debian and Ubuntu: apt install python{want}-dev)"
        )
    gpu = shutil.which('nvidia-smi') and os.environ.get('CUDA_VISIBLE_DEVICES') != ''
    if gpu and not (shutil.which('nvcc') or os.environ.get('CUDA_HOME')):
        fail(
            "this machine has an NVIDIA GPU but no nvcc, which compiles mmcv's CUDA operators; install the toolkit of "
            "torch's CUDA version, or set up for the CPU alone: CUDA_VISIBLE_DEVICES= make ..."
        )


def fingerprint(env: Environment) -> str:
    """Identify the set-up: a change of the pins, of the metadata, of this file or of the folder asks for a new run."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (env.requirements, ROOT / 'setup.py', ROOT / 'pyproject.toml', Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip(env: Environment, what: str, *args: str) -> None:
    """Run the environment's pip as one step of the set-up; its output goes into a log."""
    start, log = time.monotonic(), env.venv / 'setup.log'
    command = [str(env.interpreter), '-m', 'pip', '--disable-pip-version-check', *args]
    print(f'setup: {what} ...', end='', flush=True)
    with open(log, 'a') as output:
        status = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
    print(f' {time.monotonic() - start:.0f} s', flush=True)
    if status:
        print_end(log)
        fail(f'pip failed: {" ".join(command)}; the end of its output is above, all of it in {log}')


def print_end(log: Path) -> None:
    """Print the last lines of a log."""
    print(*log.read_text().splitlines()[-30:], sep='\n')


def create_venv(env: Environment) -> None:
    """Create the environment's folder, anew if it belongs to another Python or does not start."""
    probe = 'import sys; print("%d.%d" % sys.version_info[:2])'
    if env.interpreter.exists():
        found = subprocess.run([str(env.interpreter), '-c', probe], capture_output=True, text=True).stdout.strip()
        if found == '.'.join(map(str, env.python)):
            return
    say(f'creating {env.venv}')
    subprocess.run([sys.executable, '-m', 'venv', '--clear', str(env.venv)], check=True)


def build_jobs() -> int:
    """Return how many compilers to run at once: one a core, and 2 GiB of memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return max(1, min(cores, memory // (2 << 30)))


def show_build(lines, log, start: float) -> None:
    """Copy the build's output to ``log`` and show ninja's counter: in place on a terminal, else a line a minute."""
    tty, shown = sys.stdout.isatty(), 0.0
    for line in lines:
        log.write(line)
        step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
        now = time.monotonic()
        if not step or (not tty and now - shown < 60 and step[1] != step[2]):
            continue
        shown = now
        text = f'setup: compiling mmcv {int(step[1]):>3}/{step[2]} files, {(now - start) / 60:.1f} min'
        print(f'\r{text}' if tty else text, end='' if tty else '\n', flush=True)
    if tty:
        print()


def mmcv_wheel(env: Environment) -> Path:
    """Return mmcv's wheel from the cache, built first if it is not there."""
    key = subprocess.run([str(env.interpreter), '-c', BUILD_KEY_CODE], capture_output=True, text=True)
    if key.returncode:
        fail(f'the installed torch does not work:\n{key.stderr}')
    cache = os.environ.get('XDG_CACHE_HOME', '')
    cache = Path(cache if os.path.isabs(cache) else Path.home() / '.cache') / 'mmdet_ce'
    folder = cache / f'{env.pinned("mmcv").replace("==", "")}-{key.stdout.strip()}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f'cannot write the cache of built wheels ({error}); set XDG_CACHE_HOME to a folder that can be written')
    with open(folder / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say('another set-up is building mmcv; waiting for it')
            fcntl.flock(lock, fcntl.LOCK_EX)
        wheels = sorted(folder.glob('mmcv-*.whl'))
        if wheels:
            say(f'mmcv from the cache: {wheels[0]}')
            return wheels[0]
        return build_mmcv(env, folder)


def build_mmcv(env: Environment, folder: Path) -> Path:
    """Compile mmcv with its operators into ``folder``; the wheel appears there only when it is whole."""
    jobs = build_jobs()
    say(f'compiling mmcv with its operators, {jobs} at a time: once a machine, about 4 minutes on two cores')
    start, log_path = time.monotonic(), folder / 'build.log'
    variables = dict(
        os.environ,
        MMCV_WITH_OPS='1',
        MAX_JOBS=str(jobs),
        PYTHONUNBUFFERED='1',
        PATH=f'{env.venv / "bin"}{os.pathsep}{os.environ.get("PATH", "")}',
    )
    scratch = folder / 'build'
    shutil.rmtree(scratch, ignore_errors=True)  # of a build that was interrupted
    scratch.mkdir()
    with open(log_path, 'w') as log:
        variables.update(precompiling_compiler(scratch))
        command = [
            *(str(env.interpreter), '-m', 'pip', '--disable-pip-version-check', 'wheel', '-v', '--no-deps'),
            *('--no-build-isolation', '--no-binary', 'mmcv', '--no-cache-dir', '-w', str(scratch), env.pinned('mmcv')),
        ]
        process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        show_build(process.stdout, log, start)
        wheels = list(scratch.glob('mmcv-*.whl'))
        if process.wait() or not wheels:
            log.flush()
            print_end(log_path)
            fail(f'building mmcv failed; the end of its output is above, all of it in {log_path}')
        wheel = folder / wheels[0].name
        os.replace(wheels[0], wheel)
    shutil.rmtree(scratch)
    say(f'mmcv built in {(time.monotonic() - start) / 60:.1f} min: {wheel}')
    return wheel


def precompiling_compiler(scratch: Path) -> dict[str, str]:
    """Return the variables that put precompiled_cxx.py in the place of the compiler: 3 minutes instead of 16."""
    header = scratch / 'torch.h'
    header.write_text('#include <torch/types.h>\n')
    compiler = os.environ.get('CXX') or 'c++'
    wrapper = str(ROOT / 'tools' / 'precompiled_cxx.py')
    return dict(CXX=wrapper, MMDET_CE_CXX=compiler, MMDET_CE_HEADER=str(header), TORCH_DONT_CHECK_COMPILER_ABI='1')


def install_apart(env: Environment, name: str) -> None:
    """Put the pins of requirements-NAME.txt, which only some tests need, into the folder NAME of the venv, once."""
    requirements = ROOT / f'requirements-{name}.txt'
    folder, pins = env.venv / name, requirements.read_text()
    stamp = folder / '.pins'
    if stamp.is_file() and stamp.read_text() == pins:
        return
    shutil.rmtree(folder, ignore_errors=True)
    what = f'what the {name} tests need, into {folder}'
    pip(env, what, 'install', '--no-deps', '--target', str(folder), '-r', str(requirements))
    stamp.write_text(pins)


def main() -> None:
    """Set up, or find that nothing is to do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('environment', nargs='?', choices=[*ENVIRONMENTS], default='newest', help='(default: newest)')
    parser.add_argument('--imagenet', action='store_true', help='with what the ImageNet tests need')
    parser.add_argument('--kernels', action='store_true', help='with Triton, for the tests of the kernels')
    args = parser.parse_args()
    env = ENVIRONMENTS[args.environment]
    if not (env.stamp.is_file() and env.stamp.read_text() == fingerprint(env)):
        set_up(env)
    for name in ('imagenet', 'kernels'):
        if getattr(args, name):
            install_apart(env, name)


def set_up(env: Environment) -> None:
    """Create the environment and install everything into it."""
    start = time.monotonic()
    check_machine(env)
    create_venv(env)
    first = map(env.pinned, ('torch', 'setuptools', 'wheel', 'ninja', 'psutil'))
    pip(env, '1/4 torch and build tools', 'install', '-c', str(env.requirements), *first)
    pip(env, '2/4 mmcv', 'install', '--no-deps', str(mmcv_wheel(env)))
    # --no-deps: the requirements are the whole list, with opencv-python-headless, which needs no libGL on the machine.
    pip(env, '3/4 mmengine, mmdet and the rest', 'install', '--no-deps', '-r', str(env.requirements))
    pip(env, '4/4 mmdet_ce, editable', 'install', '--no-deps', '--no-build-isolation', '-e', str(ROOT))
    command = [str(env.interpreter), '-W', 'ignore', '-c', CHECK_CODE]
    check = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if check.returncode:
        fail(f'the installed stack does not work:\n{check.stderr}')
    env.stamp.write_text(fingerprint(env))
    say(f'ready in {(time.monotonic() - start) / 60:.1f} min: {check.stdout.strip()}')


if __name__ == '__main__':
    main()
