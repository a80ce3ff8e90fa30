"""``python -m mmdet_ce``: list the configs, copy one out, print the environment for a bug report."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from .version import __version__

PACKAGE = Path(__file__).resolve().parent
# inside an installed package, beside the package in the repository
CONFIGS = PACKAGE / 'configs' if (PACKAGE / 'configs').is_dir() else PACKAGE.parent / 'configs'


def config_names() -> list[str]:
    """Return the shipped configs as FOLDER/NAME."""
    return sorted(f'{path.parent.name}/{path.stem}' for path in CONFIGS.glob('*/*.py'))


def copy_config(name: str, folder: Path) -> list[Path]:
    """Copy a config, and the shipped ones that it inherits from, into ``folder``; return the files, the config first.

    Raises:
        FileNotFoundError: If there is no such config.
        FileExistsError: If a file of that name is in ``folder`` already; nothing is copied then.
    """
    sources = [path for path in CONFIGS.glob('*/*.py') if name in (path.stem, f'{path.parent.name}/{path.stem}')]
    if not sources:
        raise FileNotFoundError(f'no config named {name}; python -m mmdet_ce configs lists them')
    while base := re.search(r"^_base_ = '\./(.+)'", sources[-1].read_text(), re.MULTILINE):
        sources.append(sources[-1].parent / base[1])
    copies = [folder / source.name for source in sources]
    for copy in copies:
        if copy.exists():
            raise FileExistsError(f'{copy} exists already; remove it or name another folder')
    folder.mkdir(parents=True, exist_ok=True)
    for source, copy in zip(sources, copies):
        shutil.copyfile(source, copy)
    return copies


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog='python -m mmdet_ce', description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command')
    commands.add_parser('configs', help='list the shipped configs')
    copy = commands.add_parser('copy', help='copy a config out, with the shipped ones that it inherits from')
    copy.add_argument('name', help='as listed, with or without its folder')
    copy.add_argument('folder', type=Path, nargs='?', default=Path('.'), help='(default: here)')
    commands.add_parser('env', help='print versions and environment, for a bug report')
    args = parser.parse_args()
    if args.command == 'configs':
        print(*config_names(), f'(in {CONFIGS})', sep='\n')
    elif args.command == 'env':
        from mmdet.utils import collect_env  # here: the other commands do without torch

        from .compat import missing_features
        from .environment import describe_versions

        ours = dict(mmdet_ce=f'{__version__} at {PACKAGE}', versions=describe_versions())
        ours['missing with this torch'] = ', '.join(missing_features()) or 'nothing'
        for key, value in {**ours, **collect_env()}.items():
            print(f'{key}: {value}')
    elif args.command is None:
        parser.print_help()
    else:
        try:
            print(*copy_config(args.name, args.folder), sep='\n')
        except (FileNotFoundError, FileExistsError) as error:
            sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
