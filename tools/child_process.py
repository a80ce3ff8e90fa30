"""Run a tool as a process that ends with this one."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
# what a process is sent when this one is stopped, and the seconds it has to end; torch's launcher gives its own 30
SIGNALS = {signal.SIGINT: 35, signal.SIGTERM: 5, signal.SIGKILL: None}


def run_logged(command: list[str], log: Path, watch: Callable[[str], None] = lambda line: None, **options: Any) -> None:
    """Run a command and append its output to a file; if it fails, show the end of that and exit.

    ``watch`` is called with each line of the output. Options are those of subprocess.Popen.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with open(log, 'a') as output, open(log, errors='replace') as reader:
        reader.seek(0, os.SEEK_END)
        # a group of its own, so that Ctrl-C reaches it once, and what ignores it can be ended with its workers
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
        try:
            running = True
            while running:
                running = process.poll() is None
                for line in reader:
                    watch(line)
                time.sleep(0.1 if running else 0)
        finally:
            for number, seconds in SIGNALS.items():
                if process.poll() is None:
                    os.killpg(process.pid, number) if seconds is None else process.send_signal(number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(seconds)
    if process.returncode:
        print(*log.read_text(errors='replace').splitlines()[-20:], sep='\n', file=sys.stderr)
        print(f'error: {shlex.join(command)} failed; its whole output: {log}', file=sys.stderr)
        sys.exit(1)
