"""The GPU run as far as a CPU goes: facts are kept when a step is cut, and the report is made of them."""

from __future__ import annotations

import json
import logging
import os
import sys

import gpu_facts
import gpu_run
import pytest
from utils import call

CHILD = 'import time; print(\'{"fact": "speed"}\'); print("said"); time.sleep(60)'


def test_a_step_that_is_cut_loses_nothing(tmp_path):
    step = gpu_run.Step('slow', 3, ('-c', CHILD))
    assert not gpu_run.run(step, tmp_path, dict(os.environ))
    fact, end = (json.loads(line) for line in (tmp_path / 'facts.jsonl').read_text().splitlines())
    assert fact == dict(fact='speed') and end['exit_status'] == -9 and end['said'] == ['said']
    assert '## slow: ended with -9 after 3 s' in gpu_run.report([end])


@pytest.mark.parametrize('what', [*gpu_facts.CASES, 'operations', 'profile'])
def test_facts_on_a_cpu_make_a_report(monkeypatch, capsys, what):
    monkeypatch.setattr(gpu_facts, 'CASES', {what: gpu_facts.CASES.get(what, ())[-1:]})
    monkeypatch.setattr(gpu_facts, 'SHAPES', gpu_facts.SHAPES[1:2])
    monkeypatch.setenv(gpu_facts.VARIABLE, 'auto')
    monkeypatch.setattr(sys, 'argv', ['gpu_facts.py', what, '--size', '32', '32', '--rounds', '1'])
    gpu_facts.main()
    logging.disable(logging.NOTSET)
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{')]
    assert facts and not any('error' in fact for fact in facts)
    report = gpu_run.report(facts)
    assert all((fact['case'] if fact['fact'] == 'speed' else json.dumps(fact)) in report for fact in facts)


@pytest.mark.skipif(gpu_facts.CUDA, reason='for machines without a GPU')
def test_without_a_gpu_nothing_is_run(tmp_path):
    message = call(gpu_run.main, '--out-dir', tmp_path / 'out')
    assert 'sees no CUDA device; nothing was run' in message and not (tmp_path / 'out').exists()
