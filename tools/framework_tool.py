"""Run a tool of the installed MMDetection, or MMPretrain where the config is of that, after a look at the inputs."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import runpy
import shlex
import sys
from pathlib import Path

from command_line import config_path, exit_on_problems, merge_options

from checks import find_problems
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.logging import MessageHub
from torch import distributed

import mmdet_ce  # noqa: F401  (torch reads the checkpoints of trainings once it is imported)


def run(name: str) -> None:
    """Run the framework's ``tools/<name>`` ('train.py' or 'test.py') with this process's command line."""
    trains = name == 'train.py'
    cfg = find_config(sys.argv[1:])
    package = 'mmpretrain' if cfg and cfg.get('default_scope') == 'mmpretrain' else 'mmdet'
    folder = Path(importlib.import_module(package).__file__).resolve().parent
    tool = folder / '.mim' / 'tools' / name  # in its wheel, else in the clone that it was installed from
    tool = runpy.run_path(str(tool if tool.is_file() else folder.parent / 'tools' / name))
    args = tool['parse_args']()
    cfg = find_config([args.config])  # another word before it, as of --work-dir, may name a config too
    if cfg is None:
        exit_on_problems([f'config {args.config} not found; python -m mmdet_ce configs lists the shipped ones'])
    args.config = cfg.filename
    tool['main'].__globals__['parse_args'] = lambda: args  # it has read the command line; the config may be a name
    # torch's launcher and Slurm set these. If rank 0 exits, the launcher ends the other processes.
    if os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0')) == '0':
        merge_options(cfg, args.cfg_options or {})
        exit_on_problems(training_problems(cfg, args) if trains else test_problems(cfg, args))
    try:
        tool['main']()
    except BaseException as error:  # mmengine's pretty_text makes another one of Ctrl-C
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if get_rank() == 0:
            print('\nstopped', how_to_continue(args) if trains else '')
        sys.exit(130)
    if distributed.is_available() and distributed.is_initialized():
        # A thread of gloo's that is there at exit may abort.
        gc.collect()  # the model holds the group, whose threads end when nothing holds it any more
        distributed.destroy_process_group()


def find_config(words: list[str]) -> Config | None:
    """Return the config among the words of a command line; it says which framework's tool is asked for."""
    for path in map(config_path, words):
        if path.suffix in ('.py', '.json', '.yaml', '.yml') and os.path.isfile(path):
            return Config.fromfile(path)
    return None


def training_problems(cfg: Config, args: argparse.Namespace) -> list[str]:
    """Return the problems of a training."""
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    validates = cfg.get('val_dataloader') and not getattr(args, 'no_validate', False)  # an argument of mmpretrain's
    problems = find_problems(cfg, ['train', 'val'] if validates else ['train'])
    work_dir = Path(args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}')
    if (work_dir / 'last_checkpoint').is_file() and not cfg.get('resume'):
        problems.append(f'{work_dir} holds a training: give another --work-dir, or continue it with --resume')
    return problems


def test_problems(cfg: Config, args: argparse.Namespace) -> list[str]:
    """Return the problems of a test."""
    cfg.load_from = args.checkpoint
    return find_problems(cfg, ['test'])


def how_to_continue(args: argparse.Namespace) -> str:
    """Say where a training was stopped, and the command that continues it."""
    state = MessageHub.get_current_instance()
    if state.get_info('max_epochs', 1) == 1:  # so has a loop over iterations
        place = f'iteration {state.get_info("iter", 0) + 1}'
    else:
        place = f'epoch {state.get_info("epoch", 0) + 1}'
    command = shlex.join(['python', *sys.argv]) if args.launcher == 'none' else 'the same command with'
    return f'in {place}. To continue: {command}{"" if args.resume == "auto" else " --resume"}'
