"""Create one of the environments that the tests run in: its pins and this package, editable, in a folder of its own.

Standard library only: it runs before anything is installed. Safe to repeat, and to interrupt: a finished set-up is
recognised by a stamp and costs nothing, an unfinished one is continued. mmcv's operators take minutes to compile, so
the built wheel is kept in the user's cache directory and serves every later clone on the machine.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
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

# Two wheels of mmcv are interchangeable only if these agree, and what their operators are built for.
BUILD_KEY_CODE = """
import sys, platform, torch
print('-'.join(['cp%d%d' % sys.version_info[:2], platform.machine(), 'torch' + torch.__version__]))
print(torch.version.cuda or '')
print(torch.cuda.get_device_name().replace(' ', '_') if torch.cuda.is_available() else '')
"""

CHECK_CODE = 'import mmcv.ops; from mmdet_ce.environment import describe_versions as d; print(d())'


def fail(message: str) -> None:
    """Stop with one clear line."""
    sys.exit(f'setup: error: {message}')


def check_machine(env: Environment) -> None:
    """Check what set-up needs from the machine, before anything is downloaded."""
    want = '.'.join(map(str, env.python))
    if sys.version_info[:2] != env.python:
        fail(f'Python {want} is needed, this is {sys.version.split()[0]} ({sys.executable}); make PYTHON=PATH names it')
    compiler = (os.environ.get('CXX') or 'c++').split()[0]
    if shutil.which(compiler) is None:
        fail(f"no C++ compiler ('{compiler}' not found) for mmcv's operators; install one (apt install g++) or set CXX")
    if not Path(sysconfig.get_path('include'), 'Python.h').is_file():
        fail(f"Python's C headers (Python.h) are missing; install them (apt install python{want}-dev)")


def fingerprint(env: Environment) -> str:
    """Identify the set-up: a change of the pins, of the metadata, of this file or of the folder asks for a new run."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (env.requirements, ROOT / 'setup.py', ROOT / 'pyproject.toml', Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip(env: Environment, what: str, *args: str, **variables: str) -> None:
    """Run the environment's pip as one step of the set-up; it prints what fails."""
    print(f'setup: {what}', flush=True)
    command = [str(env.interpreter), '-m', 'pip', '--disable-pip-version-check', '--quiet', *args]
    if subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode:
        fail(f'pip failed: {" ".join(command)}')


def operators(cuda: str, gpu: str) -> str:
    """Return what mmcv's operators are built for, given torch's CUDA version and the GPU, '' for none."""
    if os.environ.get('FORCE_CUDA') == '1':
        return f'cu{cuda}-{gpu}'
    if not gpu:
        return 'cpu'
    major = cuda.split('.')[0]
    compiler = shutil.which('nvcc')
    version = subprocess.run([compiler, '--version'], stdout=subprocess.PIPE, text=True).stdout if compiler else ''
    if f'release {major}.' in version:
        return f'cu{cuda}-{gpu}'
    print(
        f"setup: no nvcc of CUDA {major} on the path: mmcv's operators are built for the CPU, enough for make gpu. "
        'To train detectors on the GPU install nvcc, remove the environment, and run make setup again'
    )
    return 'cpu'


def mmcv_wheel(env: Environment) -> Path:
    """Return mmcv's wheel from the cache, built first if it is not there."""
    command = [str(env.interpreter), '-W', 'ignore', '-c', BUILD_KEY_CODE]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    key, cuda, gpu = printed.splitlines()
    built_for = operators(cuda, gpu)
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    folder = cache / 'mmdet_ce' / f'{env.pinned("mmcv").replace("==", "")}-{key}-{built_for}'
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another set-up may be building it
        return next(folder.glob('mmcv-*.whl'), None) or build_mmcv(env, folder, built_for)


def build_mmcv(env: Environment, folder: Path, built_for: str) -> Path:
    """Compile mmcv with its operators into ``folder``, by precompiled_cxx.py: in 3 minutes instead of 16."""
    scratch = folder / 'build'
    shutil.rmtree(scratch, ignore_errors=True)  # of a build that was interrupted
    scratch.mkdir()
    header = scratch / 'torch.h'
    header.write_text('#include <torch/types.h>\n')
    variables = dict(
        MMCV_WITH_OPS='1',
        MAX_JOBS=str(os.cpu_count() or 1),
        PATH=f'{env.venv / "bin"}{os.pathsep}{os.environ.get("PATH", "")}',
        CXX=str(ROOT / 'tools' / 'precompiled_cxx.py'),
        MMDET_CE_CXX=os.environ.get('CXX') or 'c++',
        MMDET_CE_HEADER=str(header),
        TORCH_DONT_CHECK_COMPILER_ABI='1',
    )
    if built_for == 'cpu':
        variables['CUDA_VISIBLE_DEVICES'] = ''  # mmcv builds for every GPU that it sees
    arguments = ('--no-deps', '--no-build-isolation', '--no-binary', 'mmcv', '--no-cache-dir', '-w', str(scratch))
    pip(env, 'compiling mmcv with its operators, 2 to 4 minutes', 'wheel', *arguments, env.pinned('mmcv'), **variables)
    (built,) = scratch.glob('mmcv-*.whl')
    wheel = built.rename(folder / built.name)
    shutil.rmtree(scratch)
    return wheel


def main() -> None:
    """Set up, or find that nothing is to do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('environment', nargs='?', choices=[*ENVIRONMENTS], default='newest', help='(default: newest)')
    env = ENVIRONMENTS[parser.parse_args().environment]
    if not (env.stamp.is_file() and env.stamp.read_text() == fingerprint(env)):
        set_up(env)


def set_up(env: Environment) -> None:
    """Create the environment and install everything into it."""
    check_machine(env)
    subprocess.run([sys.executable, '-m', 'venv', str(env.venv)], check=True)  # keeps what is there
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
    print(f'setup: ready: {check.stdout.strip()}')


if __name__ == '__main__':
    main()
