"""CEResNet in training and evaluation: frozen stages, checkpointing, unset statistics, conversions, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch.nn.modules.batchnorm import _BatchNorm
from utils import assert_agree, randomize, unset_statistics

from mmdet_ce import CEResNet, ChannelEquilibrium

TINY = dict(base_channels=16)


def modes(backbone):
    return {name: ce.training for name, ce in backbone.named_ce()}


def buffers(backbone):
    return {f'{name}.{key}': value.clone() for name, ce in backbone.named_ce() for key, value in ce.named_buffers()}


@pytest.mark.parametrize('norm_eval', [True, False])
@pytest.mark.parametrize('ce_eval', [None, True, False])
@pytest.mark.parametrize('frozen_stages', [-1, 0, 2])
def test_ce_follows_norm_eval_and_frozen_stages(norm_eval, ce_eval, frozen_stages):
    backbone = CEResNet(depth=18, norm_eval=norm_eval, ce_eval=ce_eval, frozen_stages=frozen_stages, **TINY).train()
    before = buffers(backbone)
    for _ in range(3):
        sum(o.sum() for o in backbone(torch.randn(2, 3, 64, 64))).backward()
    after = buffers(backbone)
    trains = not (norm_eval if ce_eval is None else ce_eval)
    for name, ce in backbone.named_ce():
        stage = 0 if name == 'ce1' else int(name[5])
        frozen = stage <= frozen_stages
        assert ce.training is (trains and not frozen), name
        assert all(p.requires_grad is not frozen for p in ce.parameters()), name
        for key in (k for k in before if k.startswith(name + '.')):
            assert torch.equal(before[key], after[key]) is not ce.training, key
    norms = [m for m in backbone.layer4.modules() if isinstance(m, _BatchNorm)]
    assert all(m.training is not norm_eval for m in norms)
    assert not any(modes(backbone.eval()).values())


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('norm_eval', [True, False])
@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
def test_with_cp_gives_the_same_buffers_and_gradients(depth, norm_eval, norm):
    torch.manual_seed(2)
    arguments = dict(depth=depth, norm_cfg=dict(type=norm), norm_eval=norm_eval, ce_eval=False, **TINY)
    plain, other = CEResNet(**arguments), CEResNet(**arguments, with_cp=True)
    other.load_state_dict(plain.state_dict())
    plain.train(), other.train()
    for _ in range(2):
        x = torch.randn(2, 3, 64, 64)
        for model in (plain, other):
            model.zero_grad()
            sum(o.square().mean() for o in model(x)).backward()
    for (name, a), b in zip(plain.named_parameters(), other.parameters()):
        assert_agree(b.grad, a.grad, 1e-6, name)
    for key, value in buffers(plain).items():
        assert torch.equal(value, buffers(other)[key]), key


# ---- statistics that no data ever updated ----


def test_unset_statistics_are_reported_with_names_after_each_change_of_the_mode():
    backbone = CEResNet(depth=18, **TINY).eval()
    x = torch.randn(1, 3, 32, 32)
    first = unset_statistics(lambda: backbone(x))
    assert len(first) == 1
    assert all(name in first[0] for name in [name for name, _ in backbone.named_ce()])
    assert 'norm_eval=False' in first[0] and 'init_cfg' in first[0]
    assert not unset_statistics(lambda: backbone(x))
    assert unset_statistics(lambda: backbone.train().eval()(x)) == first


def test_unset_statistics_are_in_the_log_too(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    unset_statistics(lambda: CEResNet(depth=18, **TINY).eval()(torch.randn(1, 3, 32, 32)))
    logger.removeHandler(caplog.handler)
    (record,) = (r for r in caplog.records if 'statistics that no data ever updated' in r.getMessage())
    assert record.levelname == 'WARNING'


def test_unset_statistics_of_frozen_stages_are_reported_in_training():
    backbone = CEResNet(depth=18, frozen_stages=1, norm_eval=False, **TINY).train()
    (message,) = unset_statistics(lambda: backbone(torch.randn(2, 3, 64, 64)))
    assert '3 CE layers' in message and 'ce1, layer1.0.ce, layer1.1.ce.' in message


def test_statistics_that_data_updated_are_not_reported():
    backbone = CEResNet(depth=18, norm_eval=False, **TINY).train()
    assert not unset_statistics(lambda: backbone(torch.randn(2, 3, 64, 64)))
    assert not unset_statistics(lambda: backbone.eval()(torch.randn(2, 3, 64, 64)))


# ---- what frameworks do to a model ----


CHANGES = {
    'deepcopy': copy.deepcopy,
    'torch': torch.nn.SyncBatchNorm.convert_sync_batchnorm,
    'mmengine': lambda m: convert_sync_batchnorm(m, 'torch'),
    'there and back': lambda m: revert_sync_batchnorm(convert_sync_batchnorm(m, 'torch')),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize('training', [True, False])
def test_state_survives_deepcopy_and_sync_bn_conversion(change, training):
    """What mmengine does for ``sync_bn``, and on one GPU to a config of SyncBN, leaves CE alone."""
    backbone = randomize(CEResNet(depth=18, ce_eval=False, ce_cfg=dict(num_channels=16, sync=True), **TINY))
    backbone.train(training)
    other = change(copy.deepcopy(backbone)).train(training)
    assert [(name, type(ce), ce.sync) for name, ce in other.named_ce()] == [
        (name, ChannelEquilibrium, True) for name, _ in backbone.named_ce()
    ]
    x = torch.randn(2, 3, 32, 32)
    for a, b in zip(backbone(x), other(x)):
        assert_agree(b, a, 1e-5)
    state = backbone.state_dict()
    assert other.state_dict().keys() == state.keys()
    assert all(torch.allclose(t, state[key], atol=1e-5) for key, t in other.state_dict().items())
