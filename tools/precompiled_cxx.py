#!/usr/bin/env python3
"""The C++ compiler of mmcv's build, with torch's header compiled once instead of once a file.

Set-up names this script as CXX. At the first file it precompiles the header that every source of mmcv includes, with
the flags of that very call, so that they always agree, and gives it to each compilation. Where the compiler cannot
precompile it, the files are compiled as they are. Standard library only.

Environment:
    MMDET_CE_CXX: The real compiler.
    MMDET_CE_HEADER: The file torch.h in a scratch folder, which includes the header; torch.h.gch is made beside it.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Call the compiler."""
    compiler, header, args = os.environ['MMDET_CE_CXX'], os.environ['MMDET_CE_HEADER'], sys.argv[1:]
    if '-c' in args:
        # Python's -g doubles the time; a later -g0 takes it back.
        args = [*args, '-g0']
        if precompile(compiler, Path(header), args):
            args = ['-include', header, *args]
    os.execvp(compiler, [compiler, *args])


def precompile(compiler: str, header: Path, args: 'list[str]') -> bool:
    """Precompile the header once, while other calls wait for it; return whether there is one."""
    compiled, log = Path(f'{header}.gch'), header.with_suffix('.log')
    with open(header) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            with open(log, 'w') as output:
                command = [compiler, *flags(args), '-x', 'c++-header', str(header), '-o', str(compiled)]
                subprocess.call(command, stdout=output, stderr=output)
    return compiled.exists()


def flags(args: 'list[str]') -> 'list[str]':
    """Return a call's arguments without its input, its outputs and its list of dependencies."""
    rest, items = [], iter(args)
    for item in items:
        if item in ('-o', '-MF'):
            next(items)
        elif item not in ('-c', '-MMD') and not item.endswith('.cpp'):
            rest.append(item)
    return rest


if __name__ == '__main__':
    main()
