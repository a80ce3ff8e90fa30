"""A process that a tool starts ends with the tool, with all of its own processes, and what it printed is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import child_process
import pytest
from utils import is_running, wait_until

# stands for a training: two workers that ignore every signal they can, and would outlive it
TRAINING = """
import signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
workers = [subprocess.Popen(['sleep', '600']) for _ in range(2)]
print('started', *(worker.pid for worker in workers), flush=True)
time.sleep(600)
"""
# a tool that runs it, as the demo does
TOOL = """
import sys
from pathlib import Path
import child_process
child_process.SECONDS_TO_END = 0.2
child_process.run_logged([sys.executable, '-c', sys.argv[1]], Path(sys.argv[2]))
"""


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads the state of processes from /proc')
@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -2)])
def test_a_signal_ends_the_training_and_its_workers(number, status, tmp_path):
    log = tmp_path / 'output.txt'
    env = {**os.environ, 'PYTHONPATH': str(child_process.TOOLS)}
    with subprocess.Popen([sys.executable, '-c', TOOL, TRAINING, log], env=env, stderr=subprocess.DEVNULL) as tool:
        assert wait_until(lambda: log.is_file() and 'started' in log.read_text())
        workers = [int(pid) for pid in log.read_text().split()[1:]]
        assert all(map(is_running, workers))
        tool.send_signal(number)
        assert tool.wait(20) == status
        assert wait_until(lambda: not any(map(is_running, workers)), 2)


def test_workers_end_with_a_training_that_ended(tmp_path):
    code = 'import subprocess; print(subprocess.Popen(["sleep", "600"]).pid)'
    child_process.run_logged([sys.executable, '-c', code], tmp_path / 'new' / 'output.txt')
    assert wait_until(lambda: not is_running(int((tmp_path / 'new' / 'output.txt').read_text())), 2)


def test_handlers_of_signals_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), child_process.process_group(['sleep', '600']) as process:
        assert signal.getsignal(signal.SIGTERM) != before
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before and process.returncode == -signal.SIGTERM


@pytest.mark.parametrize('end, status', [('sys.exit(3)', 3), ('os.kill(os.getpid(), signal.SIGKILL)', 137)])
def test_a_failure_shows_the_end_of_the_log_and_exits_with_its_status(end, status, tmp_path, capsys):
    log, seen = tmp_path / 'output.txt', []
    log.write_text('of the run before\n')
    code = f'import os, signal, sys; print(*range(99), sep="\\n", flush=True); {end}'
    with pytest.raises(SystemExit) as info:
        child_process.run_logged([sys.executable, '-c', code], log, seen.append)
    assert info.value.code == status
    assert [int(line) for line in seen] == list(range(99)), 'each line was given to watch'
    assert log.read_text().startswith('of the run before\n0\n1\n')
    *shown, last = capsys.readouterr().err.splitlines()
    assert shown == [str(number) for number in range(79, 99)]
    assert last.startswith('error: ') and last.endswith(f' failed; its whole output: {log}')
