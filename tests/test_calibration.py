"""Calibration: the exact mean over batches, whatever their order, and nothing else changed."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models import ResNet
from utils import NoFloat64, assert_agree, randomize

from mmdet_ce import CEResNet
from mmdet_ce.calibration import calibrate


def make(**kwargs):
    return randomize(CEResNet(depth=18, base_channels=16, **kwargs)).double()


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 48, 48, generator=generator, dtype=torch.float64) for _ in range(count)]


def statistics(backbone):
    return {key: t for key, t in backbone.state_dict().items() if 'running_' in key}


@pytest.mark.parametrize('with_bn', [False, True])
def test_mean_over_batches(with_bn):
    """Of one layer's values by hand: each batch alone gives its own statistics, the result is their mean."""
    backbone, batches = make(norm_eval=True, frozen_stages=1), images(3)
    alone = []
    for batch in batches:
        one = copy.deepcopy(backbone)
        calibrate(one, [batch], 1, with_bn)
        alone.append(statistics(one))
    assert calibrate(backbone, batches, 10, with_bn) == 3
    for key, value in statistics(backbone).items():
        assert_agree(value, sum(s[key] for s in alone) / 3, 1e-12, key)


@pytest.mark.parametrize('with_bn', [False, True])
def test_changes_nothing_else(with_bn):
    backbone = make().train()
    before, modes = copy.deepcopy(backbone), [m.training for m in backbone.modules()]
    calibrate(backbone, images(2), 2, with_bn)
    for (name, a), b in zip(backbone.state_dict().items(), before.state_dict().values()):
        bn = 'running_mean' in name or 'running_var' in name
        is_ce = any(name.startswith(f'{layer}.') for layer, _ in backbone.named_ce())
        if 'running_' in name and (is_ce or (bn and with_bn)):
            assert not torch.equal(a, b), name
        else:
            assert torch.equal(a, b), name
    assert [m.training for m in backbone.modules()] == modes
    assert all(ce.momentum == 0.1 for _, ce in backbone.named_ce())


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_repairs_broken_statistics(value):
    backbone, batches = make(), images(2)
    expected = copy.deepcopy(backbone)
    calibrate(expected, batches, 2, with_bn=True)
    for tensor in statistics(backbone).values():
        tensor.fill_(value)
    calibrate(backbone, batches, 2, with_bn=True)
    for key, tensor in statistics(backbone).items():
        assert torch.equal(tensor, statistics(expected)[key]), key


def test_calibrates_a_plain_network():
    plain, batches = randomize(ResNet(depth=18, base_channels=16)).double(), images(2)
    calibrate(plain, batches, 2, with_bn=True)
    assert_agree(plain.bn1.running_mean, plain.conv1(torch.cat(batches)).mean((0, 2, 3)), 1e-12)


def test_nothing_to_calibrate():
    with pytest.raises(ValueError, match='ResNet has no layer to calibrate'):
        calibrate(ResNet(depth=18), images(1), 1)
    with pytest.raises(ValueError, match='no batch to calibrate with'):
        calibrate(make(), [], 1)


def test_a_batch_that_is_not_finite_is_refused():
    backbone = make()
    before, batches = copy.deepcopy(statistics(backbone)), images(2)
    batches[1][0, 0, 0, 0] = float('inf')
    with pytest.raises(ValueError, match='the statistics of ce1 are not finite'):
        calibrate(backbone, batches, 2)
    assert all(torch.equal(value, before[key]) for key, value in statistics(backbone).items())


def test_evaluation_agrees_with_training_after_calibration():
    """To rounding on the batch calibrated on; over several batches within 0.2 % of the outputs' energy."""
    backbone, batches = make(norm_eval=True, ce_eval=False, frozen_stages=-1), images(6)

    def drift(batch):
        trained, evaluated = copy.deepcopy(backbone).train()(batch), backbone.eval()(batch)
        return max(((a - b).square().sum() / a.square().sum()).item() for a, b in zip(trained, evaluated))

    assert drift(batches[0]) > 0.1
    calibrate(backbone, batches[:1], 1)
    assert drift(batches[0]) < 1e-20
    calibrate(backbone, batches, 6)
    assert max(map(drift, batches)) < 2e-3


def test_a_device_without_float64():
    backbone = make().float()
    before, batches = copy.deepcopy(statistics(backbone)), [batch.float() for batch in images(2)]
    with NoFloat64():
        assert calibrate(backbone, batches, 2, with_bn=True) == 2
    assert not any(torch.equal(before[key], value) for key, value in statistics(backbone).items())
