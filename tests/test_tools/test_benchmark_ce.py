"""The benchmark's report has a row for each candidate; what fails is named, and the rest is measured."""

from __future__ import annotations

import benchmark_ce
import benchmark_steps
import pytest
import torch
from utils import call


def rows(printed: str) -> list[list[str]]:
    """Return the cells of the report's rows below the head."""
    lines = [line for line in printed.splitlines() if line.startswith('| ')]
    return [line.strip('| ').split(' | ') for line in lines[2:]]


@pytest.mark.parametrize('what, measured', [('backbone', 1), ('block', 3), ('host', 2)])
def test_every_candidate_has_a_row_in_every_mode(capsys, what, measured):
    arguments = ['--what', what, '--network', 'demo', '--size', 64, 64, '--rounds', 2, '--threads', 1]
    assert call(benchmark_ce.main, *arguments) is None
    table = rows(capsys.readouterr().out)
    assert [row[1] for row in table] == ['plain', 'CE'] * measured * len(benchmark_ce.MODES)
    for mode in benchmark_ce.MODES:
        ratios = [float(row[3].split()[0]) for row in table if f'{what}, {mode}, float32' in row[0]]
        assert ratios[::2] == [1] * measured and all(ratio > 0 for ratio in ratios)


def test_what_a_step_takes_is_counted():
    """Of the plain end of a block: h, the norm's input and the ReLU's output are kept. Views start nothing."""
    h, shortcut = torch.randn(2, 8, 16, 16), torch.randn(2, 32, 16, 16)
    block = benchmark_ce.BlockEnd(8, with_ce=False).eval()
    step = benchmark_steps.Step(block, [h, shortcut], inference=False, dtype='float32')
    step()
    assert step.bytes_kept() == h.nbytes + 2 * shortcut.nbytes
    assert step.operations().startswith('4 + ')
    with benchmark_steps.Operations() as operations:
        h.flatten(1).t().add(1)
    assert operations.count == 1


def test_what_fails_is_named_and_the_rest_is_measured(capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError('out of memory\nand more')

    monkeypatch.setattr(benchmark_steps, 'failures', [])
    monkeypatch.setattr(benchmark_steps, 'profile', fail)
    arguments = ['--what', 'profile', 'host', '--mode', 'coco', '--rounds', 2]
    assert call(benchmark_ce.main, *arguments) == 'error: 1 measurements failed; each is named above'
    table = rows(capsys.readouterr().out)
    assert table[0] == ['profile, coco, float32', 'failed: RuntimeError: out of memory'] and len(table) == 5


def test_no_gpu_is_an_error():
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    assert 'sees no CUDA device; nothing was measured' in call(benchmark_ce.main, '--device', 'cuda')
