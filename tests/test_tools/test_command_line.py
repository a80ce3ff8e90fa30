"""What the tools share: variables set before torch is loaded, configs, errors in one line, metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from command_line import exit_on, exit_on_problems, read_config, read_metrics

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    'given, spins',
    [({}, '1000'), (dict(GOMP_SPINCOUNT='77'), '77'), (dict(OMP_WAIT_POLICY='PASSIVE'), '0')],
)
def test_openmp_of_a_tool_spins_briefly_unless_the_user_chose(given, spins):
    """OpenMP itself prints what it read."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(('GOMP_', 'OMP_'))}
    result = subprocess.run(
        [sys.executable, '-c', 'import command_line'],
        cwd=ROOT / 'tools',
        env={**env, 'OMP_DISPLAY_ENV': 'verbose', **given}, capture_output=True, text=True,
    )  # fmt: skip
    if 'GOMP_SPINCOUNT' not in result.stderr:
        pytest.skip("torch is built with another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{spins}'" in result.stderr


def test_read_config_merges_options_and_names_a_missing_file(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text('model = dict(depth=18)')
    assert read_config(path, {'model.depth': 50}).model.depth == 50
    with pytest.raises(SystemExit, match=r'^error: config none\.py not found$'):
        read_config('none.py')
    with pytest.raises(SystemExit, match=r'^error: config none\.py of plain not found$'):
        read_config('none.py', owner='plain')


def test_errors_for_the_user_are_one_line_and_others_are_left_alone():
    with pytest.raises(SystemExit, match='^error: what was wrong$'), exit_on(ValueError):
        raise ValueError('what was wrong')
    with pytest.raises(KeyError), exit_on(ValueError):
        raise KeyError
    exit_on_problems([])
    with pytest.raises(SystemExit, match='^error: first\nerror: second$'):
        exit_on_problems(['first', 'second'])


def test_metrics_are_those_of_the_newest_run(tmp_path):
    with pytest.raises(ValueError, match='no metrics in .*LocalVisBackend'):
        read_metrics(tmp_path)

    def write(name, *records, time):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(json.dumps(record) + '\n' for record in records))
        os.utime(path, (time, time))

    validations = [{'coco/bbox_mAP': value, 'data_time': 0.1, 'step': step} for step, value in ((1, 0.1), (2, 0.2))]
    write('1/vis_data/scalars.json', *validations, dict(loss=1.0), time=1)
    assert read_metrics(tmp_path) == {'coco/bbox_mAP': 0.2}
    write('2/2.json', {'coco/bbox_mAP': 0.3, 'time': 1.0}, time=2)
    assert read_metrics(tmp_path) == {'coco/bbox_mAP': 0.3}
    write('3/vis_data/scalars.json', dict(loss=1.0), time=3)
    with pytest.raises(ValueError, match='scalars.json has no COCO metric'):
        read_metrics(tmp_path)
