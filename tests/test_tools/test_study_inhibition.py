"""The study of inhibited channels on tiny images in folders: what it trains, what it writes, and what it refuses."""

from __future__ import annotations

import json
from argparse import Namespace

import cv2
import numpy as np
import pytest
import study_inhibition as study
import torch
from utils import call

from mmdet_ce import ChannelEquilibrium

CLASSES = ['bright', 'dark']
ARGS = Namespace(epochs=3, learning_rate=0.1)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root, random = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split in ('train', 'test'):
        for name, level in zip(CLASSES, (200, 50)):
            (root / split / name).mkdir(parents=True)
            for index in range(33):
                image = random.normal(level, 20, (20, 24, 3)).clip(0, 255).astype(np.uint8)
                assert cv2.imwrite(str(root / split / name / f'{index}.png'), image)
    return root / 'train', root / 'test'


@pytest.fixture
def data(folders):
    return [study.read_images(folder, CLASSES) for folder in folders]


@pytest.mark.parametrize('name, theta, steps', [('ce-t8', 0, 8), ('bd-t3', 30, 3), ('ir', -30, 1)])
def test_a_network_has_the_branches_and_steps_of_its_name(name, theta, steps):
    """Weight decay would bring back the branch that is off, if theta were trained."""
    ces = [m for m in study.build_network(name, 2).modules() if isinstance(m, ChannelEquilibrium)]
    assert [(ce.theta.item(), ce.bd.num_iterations) for ce in ces] == [(theta, steps)] * 4
    assert {ce.theta.requires_grad for ce in ces} == {theta == 0}


def test_training_learns(data):
    assert study.train(study.build_network('ce-t3', 2), ARGS, 1e-3, 0, data)['accuracy'] == 1


def test_a_training_that_diverges_ends_and_says_so(data):
    for decay, rate in ((0.0, 1e30), (1e10, 1e30)):
        args = Namespace(epochs=3, learning_rate=rate)
        assert study.train(study.build_network('plain', 2), args, decay, 0, data) is None


def test_measure_finds_an_inhibited_channel(data):
    network = study.build_network('plain', 2)
    for _ in range(50):
        network(data[1][0])  # the norms' running statistics
    assert study.measure(network, data[1])['inhibited'] == 0
    with torch.no_grad():
        network[0][0][1].weight[:8] = 1e-4
    measures = study.measure(network, data[1])
    assert measures['inhibited_by_layer'][0] == 8 / 32
    assert measures['inhibited'] == pytest.approx(8 / 352)


@pytest.mark.slow
def test_the_study_continues(folders, tmp_path, capsys):
    def run(*options):
        return call(study.main, *folders, '--seeds', 0, 1, '--epochs', 1, '--out-dir', tmp_path, *options)

    assert run('--networks', 'plain', '--weight-decays', 0) is None
    first = tmp_path / 'plain_wd0_seed0.json'
    result = json.loads(first.read_text())
    result['measures']['accuracy'] = 0.125
    first.write_text(json.dumps(result))
    assert run('--networks', 'plain', 'ir', '--weight-decays', 0, '2e-3') is None
    assert json.loads(first.read_text()) == result, 'a finished training is not run again'
    other = json.loads((tmp_path / 'plain_wd0_seed1.json').read_text())['measures']['accuracy']
    header, _, plain, _ = capsys.readouterr().out.splitlines()[-4:]
    mean, spread = 50 * (0.125 + other), 100 * abs(other - 0.125) / 2**0.5
    assert plain.split(' | ')[header.split(' | ').index('accuracy, weight decay 0')] == f'{mean:.1f} ± {spread:.1f}%'
    assert 'name another --out-dir' in run('--networks', 'plain', '--weight-decays', 0, '--learning-rate', 1)
