"""Calibration of a checkpoint from the command line."""

from __future__ import annotations

import calibrate
import pytest
import torch
from make_shapes_dataset import make_dataset
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from tool_runs import DEMO, SMALL
from utils import call

from mmdet_ce.checkpoints import read_checkpoint


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A training's checkpoint in a folder whose data set has no validation part."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    make_dataset(tmp_path / 'data' / 'shapes', train=2, val=1, size=64)
    (tmp_path / 'data' / 'shapes' / 'annotations' / 'instances_val.json').unlink()
    state_dict = MODELS.build(Config.fromfile(DEMO).model).state_dict()
    hub = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])), runtime_info={}, resumed_keys={})
    torch.save(dict(state_dict=state_dict, meta=dict(epoch=1), message_hub=hub), 'a.pth')
    return state_dict


@pytest.mark.parametrize('bn', [False, True])
def test_sets_the_statistics_alone(bn, checkpoint, capsys):
    options = ['--cfg-options', *SMALL, 'default_scope=None']
    assert call(calibrate.main, DEMO, 'a.pth', 'b.pth', '--num-batches', '1', *['--bn'] * bn, *options) is None
    assert f'b.pth: CE statistics{" and those of BN" * bn} from 1 batches' in capsys.readouterr().out
    written = read_checkpoint('b.pth')
    changed = {key for key, t in written['state_dict'].items() if not torch.equal(t, checkpoint[key])}
    expected = {key for key in checkpoint if 'bd.running_whitening' in key or 'ir.running_scale' in key}
    if bn:
        expected |= {key for key in checkpoint if key.endswith('running_var')}
    means = {key for key in changed if key.endswith('running_mean')}
    assert changed - means == expected and all(bn or '.bd.' in key for key in means)
    assert written['meta'] == dict(epoch=1) and written['message_hub']['log_scalars']['loss'].current() == 1.0


def test_another_model_is_refused(checkpoint, tmp_path):
    options = ['--cfg-options', *SMALL, 'model.backbone.ce_cfg.num_channels=32']
    with pytest.raises(RuntimeError, match=r'num_channels is \[16, 32\] in the file and \[32\] here'):
        call(calibrate.main, DEMO, 'a.pth', 'b.pth', *options)
    assert call(calibrate.main, DEMO, 'none.pth', 'b.pth').startswith('error: [Errno 2]')
    assert not (tmp_path / 'b.pth').exists()
