"""The study of inhibited channels on tiny images in folders: what it trains, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial

import cv2
import inhibition_training
import numpy as np
import pytest
import study_inhibition
import torch
from inhibition_training import Case, Images, Settings, build_network
from utils import call, is_running, wait_until

from mmdet_ce.ops.reference import channel_equilibrium_reference

OPTIONS = ['--seeds', 0, '--epochs', 2, '--batch-size', 8, '--jobs', 1]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Two folders of images by class: bright ones and dark ones."""
    root, random = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, count in (('train', 12), ('test', 4)):
        for name, level in (('bright', 200), ('dark', 50)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = random.normal(level, 20, (20, 24, 3)).clip(0, 255).astype(np.uint8)
                assert cv2.imwrite(str(root / split / name / f'{index}.png'), image)
    return root / 'train', root / 'test'


def settings(folders, **changes):
    return Settings(*map(str, folders), size=16, epochs=4, batch_size=8, learning_rate=0.1)._replace(**changes)


@pytest.mark.parametrize(('network', 'lam'), [('bd-t3', 1.0), ('ir', 0.0)])
def test_a_branch_stands_alone(network, lam):
    """Against the oracle with lambda 1 or 0, and after training steps, which must not move it."""
    net = build_network(network, 2)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    net(torch.randn(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    ce = net[0][1].ce
    assert torch.sigmoid(ce.theta).item() == pytest.approx(lam, abs=1e-12)
    x = torch.randn(4, ce.in_channels, 5, 5, dtype=torch.float64)
    ce = ce.double().train()
    options = dict(group_size=ce.group_size, num_iterations=ce.bd.num_iterations, eps=ce.bd.eps)
    oracle = partial(channel_equilibrium_reference, x, **options)
    with_theta, with_other = (oracle(theta, *ce.ir.gate_parameters).out for theta in (ce.theta, -ce.theta))
    assert (ce(x) - with_theta).abs().max() < 1e-9
    assert (ce(x) - with_other).abs().max() > 0.1


def test_the_plain_network_has_no_ce_and_others_have_one_in_each_layer():
    assert all(layer.ce is None for layer in build_network('plain', 2)[0])
    assert [layer.ce.bd.num_iterations for layer in build_network('ce-t8', 2)[0]] == [8] * 4


def test_batches_are_crops_and_flips_of_the_images():
    """An image that is all 1 inside stays 1 or the padding's 0, and one with a gradient is mirrored now and then."""
    ramp = torch.arange(1.0, 17).expand(3, 16, 16)
    images = Images(ramp.repeat(6, 1, 1, 1), torch.arange(6))
    generator = torch.Generator().manual_seed(0)
    batches = [b for _ in range(8) for b in inhibition_training.augmented_batches(images, 4, generator)]
    assert len(batches) == 8, 'the two images that fill no batch are left'
    rows = torch.cat([b.pixels[:, 0, 8] for b in batches])
    steps = rows.diff(dim=1)[:, 4:-4]
    assert set(steps.unique().tolist()) == {-1.0, 1.0}
    assert {round(value) for value in rows[:, 8].tolist()} >= {7, 8, 9, 10, 11}


def test_training_learns_and_measures(folders):
    result = inhibition_training.train(Case('ce-t3', 1e-3, 0), settings(folders, epochs=8), num_measures=4)
    assert result['accuracy'] == 1
    assert [entry['epoch'] for entry in result['history']] == [2, 4, 6, 8]
    assert len(result['inhibited_by_layer']) == 4
    assert result['seconds_per_step'] > 0 and result['diverged'] is False


def test_a_training_that_diverges_ends_and_says_so(folders):
    result = inhibition_training.train(Case('plain', 0.0, 0), settings(folders, learning_rate=1e30))
    assert result['diverged'] and len(result['history']) == 1


def test_weights_that_the_last_step_broke_are_no_result(folders):
    broken = settings(folders, batch_size=24, epochs=1, learning_rate=1e30)
    assert inhibition_training.train(Case('plain', 1e10, 0), broken)['diverged']


def test_a_batch_needs_its_images(folders):
    with pytest.raises(ValueError, match='has 24 images; expected a batch of 25 at least'):
        inhibition_training.train(Case('plain', 0.0, 0), settings(folders, batch_size=25))


def test_measure_finds_an_inhibited_channel(folders):
    network = build_network('plain', 2)
    images = inhibition_training.read_images(folders[1], 16, ['bright', 'dark'])
    before = inhibition_training.measure(network, images)
    with torch.no_grad():
        network[0][0].norm.weight[:8] = 1e-4
    after = inhibition_training.measure(network, images)
    assert before['inhibited_by_layer'][0] == before['dead_gammas'] == 0
    assert after['inhibited_by_layer'][0] == 8 / 32
    assert after['dead_gammas'] == 8 / 352


@pytest.mark.slow
def test_the_study_continues_and_reports_all_that_is_there(folders, tmp_path, capsys):
    def study(*networks):
        arguments = ['--networks', *networks, '--weight-decays', 0, '2e-3', '--out-dir', tmp_path]
        return call(study_inhibition.main, *folders, *arguments, *OPTIONS)

    assert study('plain') is None
    first = tmp_path / 'plain_wd0_seed0.json'
    written = first.stat().st_mtime_ns
    assert study('plain', 'ce-t3') is None
    assert first.stat().st_mtime_ns == written, 'a finished training is not run again'
    rows = json.loads((tmp_path / 'results.json').read_text())['rows']
    cells = {(row['network'], row['weight_decay']): row for row in rows}
    assert set(cells) == {(name, decay) for name in ('plain', 'ce-t3') for decay in (0.0, 0.002)}
    assert len(cells['ce-t3', 0.0]['theta'][0]) == 4
    assert 'ce-t3' in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / 'inhibition.png')).std() > 10
    message = call(study_inhibition.main, *folders, *OPTIONS, '--size', 8, '--out-dir', tmp_path)
    assert 'name another --out-dir' in message
    for content in ('{"ca', '[]', '{"a": 1}', '{"case": {}, "settings": {}}'):
        first.write_text(content)
        assert study('plain').startswith(f'error: {first} is no result of this tool')


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads the state of processes from /proc')
def test_workers_end_with_the_study(folders, tmp_path):
    """However it ends: they neither train on nor wait for ever."""
    arguments = [*folders, '--batch-size', 8, '--epochs', 10**6, '--jobs', 2, '--out-dir', tmp_path]
    command = [sys.executable, '-W', 'ignore', study_inhibition.__file__, *arguments]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL) as study:

        def workers() -> list[int]:
            lines = subprocess.run(
                ['ps', '-ww', '-o', 'pid=,args=', '--ppid', str(study.pid)], capture_output=True, text=True
            )
            return [int(line.split()[0]) for line in lines.stdout.splitlines() if 'spawn_main' in line]

        try:
            assert wait_until(lambda: len(workers()) == 2, 60)
            started = workers()
        finally:
            study.kill()
    try:
        assert wait_until(lambda: not any(map(is_running, started)), 60)
    finally:
        for pid in filter(is_running, started):
            os.kill(pid, signal.SIGKILL)


def test_bad_input_is_one_line(folders, tmp_path, capsys):
    (tmp_path / 'a').mkdir()
    for arguments, expected in (
        ([folders[0], tmp_path], 'has 1;'),
        ([*folders, '--networks', 'ce-t0'], "no network 'ce-t0'"),
    ):
        assert expected in call(study_inhibition.main, *arguments, *OPTIONS, '--out-dir', tmp_path / 'out')
    with pytest.raises(ValueError, match='has no image'):
        inhibition_training.read_images(tmp_path, 16, ['a'])
    (tmp_path / 'a' / '0.jpg').write_text('no image')
    with pytest.raises(ValueError, match='replace or remove'):
        inhibition_training.read_images(tmp_path, 16, ['a'])
    assert call(study_inhibition.main, *folders, '--epochs', 0) == 2
    assert '--epochs must be above 0' in capsys.readouterr().err
