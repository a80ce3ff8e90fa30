"""The backbones in training and evaluation: frozen stages, checkpointing, unset statistics, conversions, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.logging import MMLogger
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch.nn.modules.batchnorm import _BatchNorm
from utils import FAMILY, assert_agree, needs, randomize, unset_statistics

from mmdet_ce import CEResNet, ChannelEquilibrium

TINY = dict(depth=18, base_channels=16)


def step(backbone: torch.nn.Module, x: torch.Tensor) -> None:
    """Run a forward and a backward pass."""
    sum(level.float().square().mean() for level in backbone(x)).backward()


@pytest.mark.parametrize('norm_eval', [True, False])
@pytest.mark.parametrize('ce_eval', [None, True, False])
@pytest.mark.parametrize('frozen_stages', [-1, 0, 2])
def test_ce_follows_norm_eval_and_frozen_stages(norm_eval, ce_eval, frozen_stages):
    backbone = CEResNet(norm_eval=norm_eval, ce_eval=ce_eval, frozen_stages=frozen_stages, **TINY)
    backbone = randomize(backbone).train()
    before = copy.deepcopy(backbone.state_dict())
    step(backbone, torch.randn(2, 3, 64, 64))
    trains = not (norm_eval if ce_eval is None else ce_eval)
    for name, ce in backbone.named_ce():
        stage = 0 if name == 'ce1' else int(name[5])
        frozen = stage <= frozen_stages
        assert ce.training is (trains and not frozen), name
        assert all(p.requires_grad is not frozen for p in ce.parameters()), name
        for key, value in ce.named_buffers():
            assert torch.equal(value, before[f'{name}.{key}']) is not ce.training, key
    assert all(m.training is not norm_eval for m in backbone.layer4.modules() if isinstance(m, _BatchNorm))
    assert not any(ce.training for _, ce in backbone.eval().named_ce())


@pytest.mark.parametrize('norm_eval', [True, False])
@pytest.mark.parametrize('name, arguments', FAMILY)
def test_checkpointing(name, arguments, norm_eval):
    """The same gradients; CE's running values move once; those of a block's norms as often as in mmdet's block."""
    arguments = dict(arguments, norm_eval=norm_eval)
    with_ce = dict(type=f'CE{name}', ce_eval=False, **arguments)
    if name == 'ResNeXt':
        with_ce.update(ce_position='after_norm2')  # torch stops a recomputation before the last operation of a block
    ours = randomize(MODELS.build(with_ce)).train()
    checkpointed = MODELS.build(dict(with_ce, with_cp=True)).train()
    checkpointed.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 48, 64)
    for backbone in (ours, checkpointed):
        step(backbone, x.clone().requires_grad_())
    for (key, a), b in zip(checkpointed.named_parameters(), ours.parameters()):
        assert_agree(a.grad, b.grad, 1e-4, key)
    for (layer, a), (_, b) in zip(checkpointed.named_ce(), ours.named_ce()):
        assert all(torch.equal(p, q) for p, q in zip(a.buffers(), b.buffers())), layer

    theirs = MODELS.build(dict(type=name, with_cp=True, **arguments))
    theirs.train()  # mmdet's returns None
    without_ce = MODELS.build(dict(type=f'CE{name}', ce_cfg=None, with_cp=True, **arguments)).train()
    without_ce.load_state_dict(theirs.state_dict())
    for backbone in (theirs, without_ce):
        step(backbone, x.clone().requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(theirs.buffers(), without_ce.buffers()))


def test_two_trainings_of_the_same_start_agree_to_the_bit():
    backbone = randomize(CEResNet(norm_eval=False, **TINY)).train()
    other = copy.deepcopy(backbone)
    x = torch.randn(2, 3, 64, 64)
    for model in (backbone, other):
        step(model, x)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(backbone.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(backbone.buffers(), other.buffers()))


@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float16', marks=needs('float16 under autocast on a CPU'))])
def test_mixed_precision_trains_as_float32_does(dtype):
    """Gradients of a scaled loss, near those of float32; statistics in float32. No GPU: torch's autocast on a CPU."""
    backbone = randomize(CEResNet(norm_eval=False, **TINY)).train()
    half = copy.deepcopy(backbone)
    x = torch.randn(4, 3, 64, 64)
    step(backbone, x)
    scale = 1024.0
    with torch.autocast('cpu', getattr(torch, dtype)):
        levels = half(x)
    assert levels[-1].dtype == getattr(torch, dtype)
    (scale * sum(level.float().square().mean() for level in levels)).backward()
    ours = torch.cat([p.grad.flatten() / scale for _, ce in half.named_ce() for p in ce.parameters()])
    expected = torch.cat([p.grad.flatten() for _, ce in backbone.named_ce() for p in ce.parameters()])
    assert_agree(ours, expected, 0.03)
    for (name, a), b in zip(half.named_buffers(), backbone.buffers()):
        assert a.dtype == b.dtype and a.isfinite().all(), name
        if '.ce' in name or name.startswith('ce'):
            assert_agree(a, b, 2e-3, name)


# ---- statistics that no data ever updated ----


def test_unset_statistics_are_reported_with_names_after_each_change_of_the_mode():
    backbone = CEResNet(**TINY).eval()
    x = torch.randn(1, 3, 32, 32)
    first = unset_statistics(lambda: backbone(x))
    assert len(first) == 1
    assert all(name in first[0] for name, _ in backbone.named_ce())
    assert 'norm_eval=False' in first[0] and 'init_cfg' in first[0]
    assert not unset_statistics(lambda: backbone(x))
    assert unset_statistics(lambda: backbone.train().eval()(x)) == first


def test_unset_statistics_are_in_the_log_too(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    unset_statistics(lambda: CEResNet(**TINY).eval()(torch.randn(1, 3, 32, 32)))
    logger.removeHandler(caplog.handler)
    (record,) = (r for r in caplog.records if 'statistics that no data ever updated' in r.getMessage())
    assert record.levelname == 'WARNING'


def test_in_training_unset_statistics_are_those_of_frozen_stages():
    x = torch.randn(2, 3, 64, 64)
    frozen = CEResNet(frozen_stages=1, norm_eval=False, **TINY).train()
    (message,) = unset_statistics(lambda: frozen(x))
    assert '3 CE layers' in message and 'ce1, layer1.0.ce, layer1.1.ce.' in message
    trained = CEResNet(frozen_stages=-1, norm_eval=False, **TINY).train()
    assert not unset_statistics(lambda: trained(x))
    assert not unset_statistics(lambda: trained.eval()(x)), 'data updated them'


# ---- what frameworks do to a model ----


CHANGES = {
    'deepcopy': copy.deepcopy,
    'sync_bn': lambda m: convert_sync_batchnorm(m, 'torch'),
    'sync_bn and back': lambda m: revert_sync_batchnorm(convert_sync_batchnorm(m, 'torch')),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize('training', [True, False])
def test_state_survives_deepcopy_and_sync_bn_conversion(change, training):
    """What mmengine does for ``sync_bn``, and on one GPU to a config of SyncBN, leaves CE alone."""
    backbone = randomize(CEResNet(ce_eval=False, ce_cfg=dict(num_channels=16, sync=True), **TINY)).train(training)
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
