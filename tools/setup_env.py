"""Fill the environment of the Python that runs this: the pins of a requirements file and this package, editable.

    .venv/bin/python -W ignore tools/setup_env.py requirements.txt     as make setup does

Standard library only: it runs before anything is installed. Safe to repeat, and to interrupt: a finished set-up is
recognised by a stamp and costs nothing, an unfinished one is continued. mmcv's operators take minutes to compile, so
the built wheel is kept in the user's cache directory and serves every later clone on the machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = Path(sys.prefix) / '.mmdet_ce_ready'  # what a finished set-up leaves
CHECK_CODE = 'import mmcv.ops; from mmdet_ce.environment import describe_versions as d; print("setup: ready:", d())'


def fail(message: str) -> None:
    """Stop with one clear line."""
    sys.exit(f'setup: error: {message}')


def check_machine() -> None:
    """Check what set-up needs, before anything is downloaded."""
    if sys.prefix == sys.base_prefix:
        fail('this Python belongs to no environment (python -m venv); make setup makes one')
    compiler = (os.environ.get('CXX') or 'c++').split()[0]
    if shutil.which(compiler) is None:
        fail(f"no C++ compiler ('{compiler}' not found) for mmcv's operators; install one (apt install g++) or set CXX")
    if not Path(sysconfig.get_path('include'), 'Python.h').is_file():
        fail(f"Python's C headers (Python.h) are missing; install them (apt install python3.{sys.version_info[1]}-dev)")


def fingerprint(requirements: Path) -> str:
    """Identify the set-up: a change of the pins, of the metadata, of this file or of the folder asks for a new run."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (requirements, ROOT / 'setup.py', ROOT / 'pyproject.toml', Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip(what: str, *args: str, **variables: str) -> None:
    """Run pip as one step of the set-up; it prints what fails."""
    print(f'setup: {what}', flush=True)
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-qq', *args]
    if subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode:
        fail(f'pip failed: {" ".join(command)}')


def operators(cuda: str, gpu: str) -> str:
    """Return what mmcv's operators are built for, given torch's CUDA version and the GPU, '' for none."""
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


def mmcv_wheel(requirements: Path) -> Path:
    """Return mmcv's wheel from the cache, built first if it is not there."""
    import torch  # installed by now

    gpu = torch.cuda.get_device_name().replace(' ', '_') if torch.cuda.is_available() else ''
    built_for = operators(torch.version.cuda or '', gpu)
    # Two wheels are interchangeable only if these agree.
    version = re.search(r'^mmcv==(\S+)', requirements.read_text(), flags=re.M)[1]
    python = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    key = f'mmcv{version}-{python}-{platform.machine()}-torch{torch.__version__}-{built_for}'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    folder = cache / 'mmdet_ce' / key
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another set-up may be building it
        return next(folder.glob('mmcv-*.whl'), None) or build_mmcv(requirements, folder, built_for)


def build_mmcv(requirements: Path, folder: Path, built_for: str) -> Path:
    """Compile mmcv with its operators into ``folder``, by precompiled_cxx.py: in 3 minutes instead of 16."""
    scratch = folder / 'build'
    shutil.rmtree(scratch, ignore_errors=True)  # of a build that was interrupted
    scratch.mkdir()
    header = scratch / 'torch.h'
    header.write_text('#include <torch/types.h>\n')
    variables = dict(
        MMCV_WITH_OPS='1',
        MAX_JOBS=str(os.cpu_count() or 1),
        PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}',
        CXX=str(ROOT / 'tools' / 'precompiled_cxx.py'),
        MMDET_CE_CXX=os.environ.get('CXX') or 'c++',
        MMDET_CE_HEADER=str(header),
        TORCH_DONT_CHECK_COMPILER_ABI='1',
    )
    if built_for == 'cpu':
        variables['CUDA_VISIBLE_DEVICES'] = ''  # mmcv builds for every GPU that it sees
    arguments = ('--no-deps', '--no-build-isolation', '--no-binary', 'mmcv', '--no-cache-dir', '-w', str(scratch))
    what = 'compiling mmcv with its operators, 2 to 4 minutes'
    pip(what, 'wheel', *arguments, '-c', str(requirements), 'mmcv', **variables)
    (built,) = scratch.glob('mmcv-*.whl')
    wheel = built.rename(folder / built.name)
    shutil.rmtree(scratch)
    return wheel


def set_up(requirements: Path) -> None:
    """Install everything."""
    STAMP.unlink(missing_ok=True)  # it would be true again of a set-up for other pins that was interrupted
    check_machine()
    first = ('torch', 'setuptools', 'wheel', 'ninja', 'psutil')
    pip('1/4 torch and build tools', 'install', '-c', str(requirements), *first)
    pip('2/4 mmcv', 'install', '--no-deps', str(mmcv_wheel(requirements)))
    # --no-deps: the requirements are the whole list, with opencv-python-headless, which needs no libGL on the machine.
    pip('3/4 mmengine, mmdet and the rest', 'install', '--no-deps', '-r', str(requirements))
    pip('4/4 mmdet_ce, editable', 'install', '--no-deps', '--no-build-isolation', '-e', str(ROOT))
    if subprocess.run([sys.executable, '-W', 'ignore', '-c', CHECK_CODE], cwd=ROOT).returncode:
        fail('the installed stack does not work; the reason is above')
    STAMP.write_text(fingerprint(requirements))


def main() -> None:
    """Set up, or find that nothing is to do."""
    requirements = ROOT / sys.argv[1]
    if not (STAMP.is_file() and STAMP.read_text() == fingerprint(requirements)):
        set_up(requirements)


if __name__ == '__main__':
    main()
