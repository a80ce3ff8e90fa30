#!/usr/bin/env python3
"""The C++ compiler of mmcv's build (MMDET_CE_CXX), with torch's header compiled once instead of once a file.

At the first file it precompiles the header MMDET_CE_HEADER, which every source of mmcv includes, with the flags of that
very call, so that they always agree. Where the compiler cannot, the files are compiled as they are.
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
                # without input, outputs and list of dependencies
                drop = {'-c', '-MMD', '-o', '-MF', *(b for a, b in zip(args, args[1:]) if a in ('-o', '-MF'))}
                flags = [arg for arg in args if arg not in drop and not arg.endswith('.cpp')]
                command = [compiler, *flags, '-x', 'c++-header', str(header), '-o', str(compiled)]
                subprocess.call(command, stdout=output, stderr=output)
    return compiled.exists()


if __name__ == '__main__':
    main()
