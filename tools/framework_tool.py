"""Run a tool of the installed MMDetection, or MMPretrain where the config is of that, after a look at the inputs."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import runpy
import shlex
import signal
import sys
from pathlib import Path

from command_line import exit_on_problems, read_config

from checks import find_problems
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.logging import MessageHub
from torch import distributed as dist


def run(name: str) -> None:
    """Run the framework's ``tools/<name>`` ('train.py' or 'test.py') with this process's command line."""
    if sys.platform == 'linux' and 'LOCAL_RANK' in os.environ:
        # PR_SET_PDEATHSIG: torch's launcher, when it is killed, leaves its processes training
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    config = next((word for word in sys.argv[1:] if word.endswith('.py') and '=' not in word), None)
    cfg = read_config(config) if config else Config()  # without: --help, or the framework says what is missing
    framework = 'mmpretrain' if cfg.get('default_scope') == 'mmpretrain' else 'mmdet'
    package = Path(importlib.import_module(framework).__file__).resolve().parent
    tool = package / '.mim' / 'tools' / name  # in its wheel, else in the clone that it was installed from
    importlib.import_module('mmdet_ce')  # with it torch reads the checkpoints of trainings, those of plain networks too
    tool = runpy.run_path(str(tool if tool.is_file() else package.parent / 'tools' / name))
    args = tool['parse_args']()
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.load_from = vars(args).get('checkpoint') or cfg.get('load_from')  # a test names one
    exit_on_problems(train_problems(cfg, args) if name == 'train.py' else find_problems(cfg, ['test']))
    try:
        tool['main']()
    except BaseException as error:  # mmengine's pretty_text makes another one of Ctrl-C
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        epoch = MessageHub.get_current_instance().get_info('epoch', 0) + 1
        command = shlex.join(['python', *sys.argv]) if args.launcher == 'none' else 'the same command with'
        resume = '' if vars(args).get('resume') == 'auto' else ' --resume'
        if get_rank() == 0:
            print('\nstopped', f'in epoch {epoch}. To continue: {command}{resume}' if name == 'train.py' else '')
        sys.exit(130)
    if dist.is_available() and dist.is_initialized():  # a thread of gloo's that is still there at exit can abort
        gc.collect()  # the model holds the group, whose threads end when nothing holds it any more
        dist.destroy_process_group()


def train_problems(cfg: Config, args) -> list[str]:
    """Return the problems of a training."""
    if args.resume:
        cfg.load_from = None if args.resume == 'auto' else args.resume
    validates = cfg.get('val_dataloader') and not getattr(args, 'no_validate', False)  # an argument of mmpretrain's
    problems = find_problems(cfg, ['train', 'val'] if validates else ['train'])
    work_dir = Path(args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}')
    if (work_dir / 'last_checkpoint').is_file() and not (args.resume or cfg.get('resume')):
        problems.append(f'{work_dir} holds a training: give another --work-dir, or continue it with --resume')
    return problems
