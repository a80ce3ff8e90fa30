"""The converter of the authors' file and the publishing step: strict, whole or nothing."""

from __future__ import annotations

import json
import os
import re

import official_to_mmdet_ce
import publish_model
import pytest
import torch
from hostile import Calls
from mmengine.logging import HistoryBuffer
from test_checkpoints.test_official import released
from utils import call

from mmdet_ce import CEResNet, __version__
from mmdet_ce.checkpoints import sha256


@pytest.fixture(scope='module')
def state():
    return {f'module.{key}': value for key, value in released(depth=18, base_channels=64).items()}


def convert(*arguments):
    return call(official_to_mmdet_ce.main, *arguments)


def test_converts(state, tmp_path, capsys):
    source, destination = tmp_path / 'theirs.pth.tar', tmp_path / 'checkpoints' / 'ours.pth'
    torch.save({'epoch': 100, 'arch': 'resnetv1ce', 'state_dict': state}, source)
    assert convert(source, destination, '--depth', '18') is None
    assert re.search(r'ours.pth: \d+ tensors, 0 missing, 0 unexpected', capsys.readouterr().out)
    converted = torch.load(destination, weights_only=True)
    assert converted['meta'] == dict(
        source='theirs.pth.tar', source_sha256=sha256(source), converter=f'mmdet_ce {__version__}'
    )
    assert all(torch.is_tensor(t) for t in converted['state_dict'].values())
    backbone = CEResNet(depth=18, init_cfg=dict(type='Pretrained', checkpoint=str(destination)))
    backbone.init_weights()
    assert torch.equal(backbone.ce1.ir.fc1.weight, state['module.ce1.AR.fc.0.weight'])


def test_official_layout_of_the_whole_network(golden, tmp_path):
    """The key list of the released checkpoint: every tensor finds its place, strictly."""
    keys = json.loads((golden / 'official_resnetv1ce50_keys.json').read_text())
    shapes = keys.items() if isinstance(keys, dict) else keys
    torch.save({key: torch.zeros(shape) for key, shape in shapes}, tmp_path / 'a.pth')
    count = official_to_mmdet_ce.convert(tmp_path / 'a.pth', tmp_path / 'b.pth')
    CEResNet(depth=50).load_state_dict(torch.load(tmp_path / 'b.pth')['state_dict'], strict=True)
    assert count == len(CEResNet(depth=50).state_dict())


def test_mismatches_are_listed_and_nothing_is_written(state, tmp_path):
    bad = dict(state)
    del bad['module.layer2.0.conv1.weight']
    bad['module.layer9.weight'] = torch.zeros(1)
    bad['module.conv1.weight'] = torch.zeros(64, 4, 7, 7)
    torch.save(bad, tmp_path / 'a.pth')
    message = convert(tmp_path / 'a.pth', tmp_path / 'out' / 'b.pth', '--depth', '18')
    assert message.startswith('error: ') and '\n' not in message
    assert 'Missing (1): layer2.0.conv1.weight. Unexpected (1): layer9.weight.' in message
    assert 'shape (1): conv1.weight (64, 4, 7, 7) for (64, 3, 7, 7)' in message
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'kind, message',
    [
        ('depth', 'error: .* is not a checkpoint of the released CE-ResNet-50'),
        ('plain', 'error: no CE tensor'),
        ('list', 'error: .* holds a list; expected a state dict'),
        ('text', 'error: .* holds something else than tensors: epoch'),
        ('hostile', 'error: .* refused, and nothing in it was run'),
        ('truncated', 'error: checkpoint .* is incomplete, damaged or no checkpoint'),
        ('missing', 'error: checkpoint .* not found'),
    ],
)
def test_bad_sources(kind, message, state, tmp_path):
    source, destination, marker = tmp_path / 'a.pth', tmp_path / 'b.pth', tmp_path / 'marker'
    content = {
        'plain': {'conv1.weight': torch.zeros(1)},
        'list': [torch.zeros(1)],
        'text': {**state, 'epoch': 'three'},
        'hostile': {**state, 'payload': Calls(os.system, f'touch {marker}')},
    }.get(kind, state)
    if kind != 'missing':
        torch.save(content, source)
    if kind == 'truncated':
        source.write_bytes(source.read_bytes()[:100_000])
    assert re.match(message, convert(source, destination))
    assert not destination.exists() and not marker.exists()


def test_publish(tmp_path):
    checkpoint = dict(
        state_dict={'w': torch.arange(3.0)},
        optimizer=dict(state={0: dict(exp_avg=torch.zeros(10_000))}, param_groups=[dict(lr=0.1, params=[0])]),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])), runtime_info={}, resumed_keys={}),
        meta=dict(epoch=12, dataset_meta=dict(classes=('cat',)), cfg='model = dict()', hook_msgs={}),
    )
    torch.save(checkpoint, tmp_path / 'epoch_12.pth')
    named = publish_model.publish(tmp_path / 'epoch_12.pth', tmp_path / 'mask-rcnn_r50-ce.pth')
    assert named.name == f'mask-rcnn_r50-ce-{sha256(named)[:8]}.pth'
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(['epoch_12.pth', named.name])
    published = torch.load(named, weights_only=True)
    assert sorted(published) == ['meta', 'state_dict'] and torch.equal(published['state_dict']['w'], torch.arange(3.0))
    assert published['meta']['dataset_meta'] == dict(classes=('cat',)) and published['meta']['epoch'] == 12


def test_publish_refuses_what_is_no_checkpoint(tmp_path):
    torch.save({'w': torch.zeros(1)}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="has no 'state_dict' with tensors"):
        publish_model.publish(tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']
