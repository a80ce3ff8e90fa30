"""The converter of the authors' file and the publishing step: strict, as data, whole or nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
import re

import hostile
import official_to_mmdet_ce
import publish_model
import pytest
import torch
from mmengine.logging import HistoryBuffer
from test_checkpoints.test_official import released
from utils import call

from mmdet_ce import CEResNet, __version__
from mmdet_ce.compat import TORCH


@pytest.fixture(scope='module')
def state():
    state = released(depth=18, base_channels=64)
    # PyTorch before 0.4.1, which the authors may have used, counted no batches.
    return {f'module.{key}': value for key, value in state.items() if 'num_batches' not in key}


def test_converts(state, tmp_path, capsys):
    source, destination = tmp_path / 'theirs.pth.tar', tmp_path / 'checkpoints' / 'ours.pth'
    torch.save({'epoch': 100, 'arch': 'resnetv1ce', 'state_dict': state}, source)
    assert call(official_to_mmdet_ce.main, source, destination, '--depth', '18') is None
    assert re.search(r'ours.pth: \d+ tensors, 0 missing, 0 unexpected', capsys.readouterr().out)
    saved = torch.load(destination, weights_only=True)['state_dict']
    assert saved._metadata['']['ce_cfg']['num_iterations'] == [3]
    backbone = CEResNet(depth=18, init_cfg=dict(type='Pretrained', checkpoint=str(destination)))
    backbone.init_weights()
    assert torch.equal(backbone.ce1.ir.fc1.weight, state['module.ce1.AR.fc.0.weight'])


def test_mismatches_are_listed_and_nothing_is_written(state, tmp_path):
    bad = {**state, 'module.layer9.weight': torch.zeros(1)}
    del bad['module.layer2.0.conv1.weight']
    torch.save(bad, tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match=r'(?s)Missing .*"layer2.0.conv1.weight".*Unexpected .*"layer9.weight"'):
        official_to_mmdet_ce.convert(tmp_path / 'a.pth', tmp_path / 'out' / 'b.pth', 18)
    torch.save({**state, 'module.\x1b[2K\nerror: all is well': torch.zeros(1)}, tmp_path / 'a.pth')
    message = call(official_to_mmdet_ce.main, tmp_path / 'a.pth', tmp_path / 'b.pth', '--depth', 18)
    assert message.isprintable() and '\\x1b[2K error: all is well' in message
    torch.save({'conv1.weight': torch.zeros(1)}, tmp_path / 'a.pth')
    assert call(official_to_mmdet_ce.main, tmp_path / 'a.pth', tmp_path / 'b.pth').startswith('error: no CE tensor')
    assert call(official_to_mmdet_ce.main, tmp_path / 'none.pth', tmp_path / 'b.pth').startswith('error: [Errno 2]')
    assert os.listdir(tmp_path) == ['a.pth']


@pytest.fixture
def trained(tmp_path):
    """A checkpoint with all that a training saves."""
    state_dict = torch.nn.ModuleDict(dict(backbone=CEResNet(depth=18, base_channels=16))).state_dict()
    checkpoint = dict(
        state_dict=state_dict,
        optimizer=dict(state={0: dict(exp_avg=torch.zeros(10_000))}, param_groups=[dict(lr=0.1, params=[0])]),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])), runtime_info=dict(cfg='model = dict()')),
        meta=dict(epoch=12, dataset_meta=dict(classes=('cat',)), cfg='model = dict()', config='import os'),
    )
    torch.save(checkpoint, tmp_path / 'epoch_12.pth')
    return tmp_path / 'epoch_12.pth', state_dict


def test_publish(trained, tmp_path, capsys):
    path, state_dict = trained
    assert call(publish_model.main, path, tmp_path / 'new' / 'mask-rcnn_r50-ce.pth') is None
    (named,) = (tmp_path / 'new').iterdir()
    assert named.name == f'mask-rcnn_r50-ce-{hashlib.sha256(named.read_bytes()).hexdigest()[:8]}.pth'
    assert f'written: {named}' in capsys.readouterr().out
    published = torch.load(named, weights_only=True)
    assert published.keys() == {'meta', 'state_dict'}
    ce_cfg = dict(num_iterations=[3], num_channels=[16], ce_position='after_norm3')
    expected = dict(epoch=12, dataset_meta=dict(classes=('cat',)), ce_cfg=dict(backbone=ce_cfg))
    assert published['meta'] == dict(expected, mmdet_ce_version=__version__)
    assert all(torch.equal(t, state_dict[key]) for key, t in published['state_dict'].items())
    assert published['state_dict']._metadata == state_dict._metadata
    torch.save({'w': torch.zeros(1)}, tmp_path / 'a.pth')
    assert "has no 'state_dict'" in call(publish_model.main, tmp_path / 'a.pth', tmp_path / 'z.pth')
    assert sorted(os.listdir(tmp_path)) == ['a.pth', 'epoch_12.pth', 'new']


@pytest.mark.parametrize('tool', [official_to_mmdet_ce.convert, publish_model.publish])
def test_hostile_files_do_not_run(tool, state, tmp_path):
    if TORCH < (2, 6) and tool is publish_model.publish:
        pytest.skip("torch < 2.6 unpickles a training's checkpoint")
    marker = tmp_path / 'marker'
    torch.save({'state_dict': {**state, 'payload': hostile.live(marker)['os.system']}}, tmp_path / 'a.pth')
    with pytest.raises(pickle.UnpicklingError):
        tool(tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert os.listdir(tmp_path) == ['a.pth']
