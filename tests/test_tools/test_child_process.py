"""A process that a tool starts ends with the tool, and what it printed is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import child_process
import pytest
from utils import is_running, wait_until

# a training with a worker, which ends at SIGINT as tools/train.py does; the other ignores what it can
ENDS = """
import subprocess, time
worker = subprocess.Popen(['sleep', '600'])
print('started', worker.pid, flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    worker.kill()
    print('stopped in epoch 3', flush=True)
"""
IGNORES = """
import signal, subprocess, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print('started', subprocess.Popen(['sleep', '600']).pid, flush=True)
time.sleep(600)
"""
# a tool that runs it, as the demo does
TOOL = """
import signal, sys
from pathlib import Path
import child_process
child_process.SIGNALS = {signal.SIGINT: float(sys.argv[3]), signal.SIGTERM: 0.1, signal.SIGKILL: None}
child_process.run_logged([sys.executable, '-c', sys.argv[1]], Path(sys.argv[2]))
"""


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads the state of processes from /proc')
@pytest.mark.parametrize(('training', 'seconds'), [(ENDS, '9'), (IGNORES, '0.1')], ids=['ends', 'ignores signals'])
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_a_signal_ends_the_training_and_its_workers(training, seconds, number, status, tmp_path):
    log = tmp_path / 'output.txt'
    env = {**os.environ, 'PYTHONPATH': str(child_process.TOOLS)}
    command = [sys.executable, '-c', TOOL, training, log, seconds]
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as tool:
        assert wait_until(lambda: log.is_file() and 'started' in log.read_text())
        worker = int(log.read_text().split()[1])
        assert is_running(worker)
        tool.send_signal(number)
        assert tool.wait(20) == status
        assert wait_until(lambda: not is_running(worker), 2)
    assert ('stopped in epoch 3' in log.read_text()) == (training is ENDS)


@pytest.mark.parametrize('end', ['sys.exit(3)', 'os.kill(os.getpid(), signal.SIGKILL)'])
def test_a_failure_shows_the_end_of_the_log(end, tmp_path, capsys):
    log, seen = tmp_path / 'output.txt', []
    log.write_text('of the run before\n')
    code = f'import os, signal, sys; print(*range(99), sep="\\n", flush=True); {end}'
    with pytest.raises(SystemExit) as info:
        child_process.run_logged([sys.executable, '-c', code], log, seen.append)
    assert info.value.code == 1
    assert [int(line) for line in seen] == list(range(99)), 'each line was given to watch'
    assert log.read_text().startswith('of the run before\n0\n1\n')
    *shown, last = capsys.readouterr().err.splitlines()
    assert shown == [str(number) for number in range(79, 99)]
    assert last.startswith('error: ') and last.endswith(f' failed; its whole output: {log}')
