"""The engine of compare_seeds.py and benchmark_coco.py: what it takes a folder for, before anything is trained."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import compare_seeds
import pytest
from coco.plan import Job
from coco.results import add_result, ap, read_results
from conftest import ROOT
from provenance import provenance
from trainings import RECORD, Training, train
from utils import call

CONFIG = str(ROOT / 'configs' / 'demo' / 'mask-rcnn_r18_fpn_8e_shapes.py')


@pytest.fixture
def training(tmp_path):
    return Training(CONFIG, tmp_path / 'seed_0', ['randomness.seed=0'])


def begin(training: Training, **content: object) -> None:
    """Leave what a start leaves, and these entries of its record."""
    training.work_dir.mkdir()
    record = dict(identity=training.identity(), metrics={}, starts=[provenance()])
    (training.work_dir / RECORD).write_text(json.dumps({**record, **content}))


def test_only_checkpoints_of_epochs_are_counted(training):
    begin(training)
    for name in ('epoch_2.pth', 'epoch_10.pth', 'epoch_11-1a2b3c4d.pth', 'best_coco_bbox_mAP_epoch_12.pth'):
        (training.work_dir / name).write_bytes(b'1')
    assert training.epochs_done() == 10


RECORDS = ['', '{"identity": {"comm', '[1]', '3', '{"foo": 1}', '{"identity": {}}', '{"identity": {"command": []}}']


@pytest.mark.parametrize('content', RECORDS)
def test_a_damaged_record_is_no_record(training, content):
    training.work_dir.mkdir()
    (training.work_dir / RECORD).write_text(content)
    assert training.record() == {} and training.epochs_done() == 0 and training.folder_problem() is None
    (training.work_dir / 'epoch_1.pth').write_bytes(b'1')
    assert 'does not say which; move it away' in training.folder_problem()


def test_other_data_is_another_training(training):
    """What was trained on a part of COCO is not taken for COCO's when the part was completed in its place."""
    begin(training._replace(data='a subset of COCO'), metrics={'coco/bbox_mAP': 0.1})
    assert training._replace(data='a subset of COCO').is_done()
    assert not training.is_done() and 'other data' in training.folder_problem()


def test_a_log_is_kept_where_epochs_are_done(training):
    """Also of a record without starts, as earlier versions wrote it; and a log that is gone ends nothing."""
    training = training._replace(options=['train_cfg.max_epochs=1'])
    begin(training)
    record = training.work_dir / RECORD
    record.write_text(json.dumps(dict(identity=training.identity(), metrics={})))
    (training.work_dir / 'epoch_1.pth').write_bytes(b'1')
    training.log.write_text('kept')
    assert train(training, lambda one: {'coco/bbox_mAP': 0.5})['metrics'] == {'coco/bbox_mAP': 0.5}
    assert training.log.read_text() == 'kept'
    record.write_text(json.dumps(dict(identity=training.identity(), metrics={}, starts=[])))
    training.log.unlink()
    assert train(training, lambda one: {'coco/bbox_mAP': 0.5})['hardware'].startswith('CPU: ')


# compare_seeds


def problem(tmp_path: Path, *options: str) -> str:
    """What compare_seeds says of a second run with these options; nothing may start."""
    arguments = ['--run', 'good', CONFIG, '--run', 'other', *options, '--out-dir', tmp_path / 'out']
    message = call(compare_seeds.main, *arguments)
    assert not list(tmp_path.rglob(RECORD)), 'a training started'
    return message


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('model = dict(', 'cannot be read (SyntaxError'),
        ('model = dict(type="ResNet")', 'has no train_cfg.max_epochs; expected a training by epochs'),
        ('train_cfg = dict(max_iters=9)', 'has no train_cfg.max_epochs'),
    ],
)
def test_all_configs_are_read_before_the_first_training(tmp_path, content, expected):
    (tmp_path / 'bad.py').write_text(content)
    (line,) = problem(tmp_path, str(tmp_path / 'bad.py')).splitlines()
    assert line.startswith('error: ') and expected in line


def test_options_and_output_folder_are_checked(tmp_path):
    assert 'with the options foo randomness.seed=0 cannot be read' in problem(tmp_path, CONFIG, 'foo')
    (tmp_path / 'out').write_text('a file')
    message = problem(tmp_path, CONFIG)
    assert message.endswith('out cannot be made (File exists); name another with --out-dir') and '\n' not in message


# The results of benchmark_coco


def test_a_result_of_masks_alone_leaves_the_file_readable(training, tmp_path):
    path = tmp_path / 'results.json'
    record = partial(dict, hardware='CPU', starts=[provenance()])
    for seed, (name, metrics) in enumerate({'a': {'coco/segm_mAP': 0.3}, 'b': {'coco/bbox_mAP': 0.4}}.items()):
        add_result(path, Job(name, seed, training, False), record(metrics=metrics), [])
    results = read_results(path)
    assert ap(results, 'a') == '- / 30.0' and ap(results, 'b') == '40.0' and ap(results, 'c') is None
    del results['a']['0']['starts'][0]['date']
    path.write_text(json.dumps(dict(results=results)))
    with pytest.raises(ValueError, match=r"results.json holds no results of this tool \(KeyError: 'date'\)"):
        read_results(path)
