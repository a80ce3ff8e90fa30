"""Run a tool of the installed MMDetection, or MMPretrain where the config is of that, after a look at the inputs."""

from __future__ import annotations

import errno
import gc
import importlib
import re
import runpy
import sys
import traceback
from pathlib import Path
from typing import Optional
from urllib.error import URLError

from command_line import exit_on_problems, flush_denormals

from mmengine.config import Config
from mmengine.runner import Runner
from torch import distributed as dist

from mmdet_ce.backbones.loading_report import CheckpointMismatchError
from mmdet_ce.checkpoints import CheckpointFileError, FolderInUseError, printable
from mmdet_ce.checkpoints.resume import prepare_resume
from mmdet_ce.preflight import find_problems

# a module that a config needs -> what to say
NOT_INSTALLED = {
    'mmpretrain': (
        'trains with mmpretrain, which is not installed: pip install "mmpretrain>=1.2" (it needs the torchvision that '
        'was built for your torch)'
    ),
    'pkg_resources': (
        "inherits from an installed package, which mmengine finds with setuptools' pkg_resources; setuptools 82 has "
        'none: pip install "setuptools<82"'
    ),
}


def framework_of(arguments: list[str]) -> str:
    """Return the framework that the config on the command line belongs to: 'mmpretrain', else 'mmdet'.

    Raises:
        FileNotFoundError: If it needs a module that is not installed.
    """
    for path in (Path(a) for a in arguments if a.endswith('.py') and Path(a).is_file()):
        try:
            return 'mmpretrain' if Config.fromfile(path).get('default_scope') == 'mmpretrain' else 'mmdet'
        except ModuleNotFoundError as error:
            advice = next((text for name, text in NOT_INSTALLED.items() if name in str(error)), None)
            if advice is None:
                raise
            raise FileNotFoundError(f'{path} {advice}') from error
    return 'mmdet'


# what the framework failed with -> what that means
IMAGE_ERRORS = {
    r'AssertionError: failed to load image: (.+)': 'image {} is damaged or no image',
    r"(?s)loading\.py.+FileNotFoundError: [^\n]*No such file or directory: '([^']+)'": 'image {} not found',
    r'OpenCV.+ (!buf\.empty\(\))': 'an image file is empty (find DATA_ROOT -empty names it)',
    r'OpenCV.+ (inv_scale_.) > 0': 'an image is so narrow that resizing leaves it no pixel',
}


def image_error(error: Exception) -> Optional[str]:
    """Say which image the framework failed at, here or in a worker, or None if it was something else."""
    text = ''.join(traceback.format_exception(None, error, error.__traceback__))
    for pattern, message in IMAGE_ERRORS.items():
        if match := re.search(pattern, text):
            return (
                f'{message.format(match[1])}; replace it or leave it out of the annotations. Checkpoints are as they '
                'were: a training continues with --resume'
            )
    return None


def find_tool(name: str, framework: str = 'mmdet') -> Path:
    """Return the installed framework's ``tools/<name>``: in its wheel, or in the clone it was installed from.

    Raises:
        FileNotFoundError: If the installed distribution came without tools.
    """
    module = importlib.import_module(framework)
    package = Path(module.__file__).resolve().parent
    for tool in (package / '.mim' / 'tools' / name, package.parent / 'tools' / name):
        if tool.is_file():
            return tool
    raise FileNotFoundError(
        f'the installed {framework} {module.__version__} at {package} has no tools/{name}; install one that has, like '
        'the wheel of mmdet 3.3.0 or mmpretrain 1.2.0, or a clone of its repository (pip install -e)'
    )


def run(name: str) -> None:
    """Run the framework's ``tools/<name>`` ('train.py' or 'test.py') with this process's command line."""
    flush_denormals()
    message = run_until_error(name)
    leave_process_group(failed=message is not None)
    if message is not None:
        sys.exit(f'error: {message}')


def run_until_error(name: str) -> Optional[str]:
    """Run the framework's tool; return what went wrong in words for the user, or None if it ran to its end."""
    try:
        framework = framework_of(sys.argv[1:])
        tool = runpy.run_path(str(find_tool(name, framework)), run_name=f'{framework}_{name}')
        args = tool['parse_args']()
        exit_on_problems(check(args, Path(name).stem))
        tool['main']()
        return None
    except URLError as error:
        return f'a checkpoint or file of weights could not be downloaded: {error.reason}'
    except (CheckpointFileError, CheckpointMismatchError, FolderInUseError) as error:
        return str(error)
    except Exception as error:
        problem = image_error(error) or disk_error(error) or resume_error(error)
        if problem:
            return problem
        # with a file name it comes from the operating system, somewhere inside: its traceback tells where
        if isinstance(error, FileNotFoundError) and error.filename is None:
            return str(error)
        raise


# a full disk, a quota, a limit on file sizes, a folder that only can be read
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def disk_error(error: Exception) -> Optional[str]:
    """Say that nothing can be written, where that is what went wrong."""
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
        return None
    place = f'{error.filename}: ' if error.filename else ''
    return f'{place}{error.strerror}; make room there, or name another --work-dir. Checkpoints are as they were'


def resume_error(error: Exception) -> Optional[str]:
    """Say that a checkpoint does not fit the training, where mmengine failed while it resumed from it."""
    if all(frame.f_code is not Runner.resume.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        return None
    return (
        f'the training cannot be resumed from this checkpoint ({type(error).__name__}: {printable(error)}); '
        'expected one that a training of this config wrote'
    )


def leave_process_group(failed: bool) -> None:
    """Leave torch.distributed, all of whose threads are then gone: gloo's, still there at exit, can abort the process.

    Args:
        failed: Whether the run ended with an error. NCCL is not left then: it would wait for the other processes.
    """
    if dist.is_available() and dist.is_initialized() and not (failed and dist.get_backend() != 'gloo'):
        gc.collect()  # the model holds the group, which ends its threads when nothing holds it any more
        dist.destroy_process_group()


def check(args, split: str) -> list[str]:
    """Return the problems of the run that ``args``, the framework's parsed command line, asks for."""
    if not Path(args.config).is_file():
        return [f'config {args.config} not found; the shipped ones are in {Path(__file__).parent.parent / "configs"}']
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if split == 'test':
        return find_problems(cfg, split, args.checkpoint)
    auto = args.resume == 'auto' or (args.resume is None and cfg.get('resume') and not cfg.get('load_from'))
    problems = find_problems(cfg, split, None if auto else args.resume)
    if auto and not problems:
        try:
            note = prepare_resume(args.work_dir or cfg.get('work_dir') or Path('work_dirs', Path(args.config).stem))
        except CheckpointFileError as error:
            return [str(error)]
        if note:
            print(note)
    return problems
