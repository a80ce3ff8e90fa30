"""Run a tool of the installed MMDetection, or MMPretrain where the config is of that, after a look at the inputs."""

from __future__ import annotations

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
from torch import distributed as dist

from mmdet_ce.backbones.loading_report import CheckpointMismatchError
from mmdet_ce.checkpoints import CheckpointFileError, FolderInUseError
from mmdet_ce.checkpoints.resume import prepare_resume
from mmdet_ce.preflight import find_problems


def framework_of(arguments: list[str]) -> str:
    """Return the framework that the config on the command line belongs to: 'mmpretrain', else 'mmdet'.

    Raises:
        FileNotFoundError: If it inherits from mmpretrain, and that is not installed.
    """
    for path in (Path(a) for a in arguments if a.endswith('.py') and Path(a).is_file()):
        try:
            return 'mmpretrain' if Config.fromfile(path).get('default_scope') == 'mmpretrain' else 'mmdet'
        except ModuleNotFoundError as error:
            if 'mmpretrain' not in str(error):
                raise
            raise FileNotFoundError(
                f'{path} trains with mmpretrain, which is not installed: pip install "mmpretrain>=1.2" (it needs the '
                'torchvision that was built for your torch)'
            ) from error
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


def leave_process_group(backends: tuple[str, ...]) -> None:
    """Leave torch.distributed if it runs on one of these backends."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() in backends:
        dist.destroy_process_group()


def run(name: str) -> None:
    """Run the framework's ``tools/<name>`` ('train.py' or 'test.py') with this process's command line."""
    flush_denormals()
    try:
        framework = framework_of(sys.argv[1:])
        tool = runpy.run_path(str(find_tool(name, framework)), run_name=f'{framework}_{name}')
        args = tool['parse_args']()
        exit_on_problems(check(args, Path(name).stem))
        tool['main']()
        leave_process_group(('gloo', 'nccl'))
    except FileNotFoundError as error:
        if problem := image_error(error):
            sys.exit(f'error: {problem}')
        if error.filename is not None:  # raised by the operating system somewhere inside: its traceback tells where
            raise
        sys.exit(f'error: {error}')
    except URLError as error:
        sys.exit(f'error: a checkpoint or file of weights could not be downloaded: {error.reason}')
    except (CheckpointFileError, CheckpointMismatchError, FolderInUseError) as error:
        sys.exit(f'error: {error}')
    except Exception as error:
        if problem := image_error(error):
            sys.exit(f'error: {problem}')
        raise
    finally:
        # After an error, too: gloo's threads, still running at exit, can abort the process. NCCL would wait here for
        # what the other processes no longer do; the launcher ends them.
        leave_process_group(('gloo',))


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
