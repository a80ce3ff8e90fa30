"""Run the other tools as processes that end with this one."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
SECONDS_TO_END = 5  # between SIGTERM and SIGKILL
LINES_SHOWN = 20  # of the output of what failed


def tool_command(name: str, *arguments: Any) -> list[str]:
    """Return the command line of a tool of this folder."""
    return [sys.executable, '-W', 'ignore', str(TOOLS / name), *map(str, arguments)]


@contextlib.contextmanager
def process_group(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Start a command in a process group of its own, and end the whole group with the block: its workers, too.

    Inside the block SIGTERM and SIGHUP leave it, as SIGINT does, with the exit status that a shell gives them.

    Args:
        command: The command line.
        options: What else subprocess.Popen takes.
    """

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            yield process
        finally:
            end_group(process)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_group(process: subprocess.Popen) -> None:
    """End a process that leads a group, and all that is left of the group."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_logged(command: list[str], log: Path, watch: Callable[[str], None] = lambda line: None, **options: Any) -> None:
    """Run a command and append its output to a file; if it fails, end as ``exit_if_failed`` does.

    Args:
        command: The command line.
        log: The file. The output goes there directly, so that nothing of it is lost if this process ends.
        watch: Called with each line of the output.
        options: What else subprocess.Popen takes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as output, open(log, errors='replace') as reader:
        reader.seek(0, os.SEEK_END)
        with process_group(command, stdout=output, stderr=subprocess.STDOUT, **options) as process:
            running = True
            while running:
                running = process.poll() is None
                for line in iter(reader.readline, ''):
                    watch(line)
                time.sleep(0.1 if running else 0)
    exit_if_failed(command, process.returncode, log)


def exit_if_failed(command: list[str], status: int, log: Path) -> None:
    """Exit with a command's status, unless that is 0, after the end of its output and where all of it is."""
    if not status:
        return
    lines = log.read_text(errors='replace').splitlines()
    print(*lines[-LINES_SHOWN:], sep='\n', file=sys.stderr)
    print(f'error: {shlex.join(command)} failed; its whole output: {log}', file=sys.stderr)
    sys.exit(status if status > 0 else 128 - status)  # a signal as a shell reports it
