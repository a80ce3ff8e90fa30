"""``python -m mmdet_ce``: list the configs, copy one out, print the environment for a bug report."""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

from mmdet.utils import collect_env

from .compat import missing_features
from .environment import describe_versions
from .version import __version__

PACKAGE = Path(__file__).resolve().parent
# inside an installed package, beside the package in the repository
CONFIGS = PACKAGE / 'configs' if (PACKAGE / 'configs').is_dir() else PACKAGE.parent / 'configs'


def config_names() -> list[str]:
    """Return the shipped configs as FOLDER/NAME."""
    return sorted(f'{path.parent.name}/{path.stem}' for path in CONFIGS.glob('*/*.py'))


def find_configs(name: str) -> list[Path]:
    """Return the shipped configs of a name, NAME or FOLDER/NAME."""
    return [path for path in CONFIGS.glob('*/*.py') if name in (path.stem, f'{path.parent.name}/{path.stem}')]


def copy_config(name: str, folder: Path) -> list[Path]:
    """Copy a config, and the shipped ones that it inherits from, into ``folder``; return the files, the config first.

    All files land in ``folder`` itself, and the copies inherit from each other there.

    Raises:
        FileNotFoundError: If there is no such config.
        FileExistsError: If a file of that name is in ``folder`` already; nothing is copied then.
    """
    sources = find_configs(name)
    if not sources:
        raise FileNotFoundError(f'no config named {name}; python -m mmdet_ce configs lists them')
    texts = {}  # by the path of the copy
    for source in sources:  # grows on the way
        text = source.read_text()
        for base in _relative_bases(text):
            sources.append(source.parent / base)
            text = text.replace(f"'{base}'", f"'./{Path(base).name}'")
        texts[folder / source.name] = text
    for copy in texts:
        if copy.exists():
            raise FileExistsError(f'{copy} exists already; remove it or name another folder')
    folder.mkdir(parents=True, exist_ok=True)
    for copy, text in texts.items():
        copy.write_text(text)
    return [*texts]


def _relative_bases(text: str) -> list[str]:
    """Return the shipped files that a config inherits from; those of MMDetection are named like mmdet::FILE."""
    bases = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) == '_base_':
            value = ast.literal_eval(node.value)
            bases += [value] if isinstance(value, str) else value
    return [base for base in bases if '::' not in base]


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
