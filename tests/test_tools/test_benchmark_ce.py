"""The benchmark's yardstick computes what CE computes, its rivals take part, and the tool prints its tables."""

from __future__ import annotations

import copy

import benchmark_ce
import pytest
import torch
from benchmark import models
from utils import assert_agree, call, randomize

from mmdet_ce import CEResNet, ChannelEquilibrium


@pytest.mark.parametrize('training', [True, False])
def test_released_form_equals_the_block(training):
    ce = randomize(ChannelEquilibrium(32)).double().train(training)
    released = models.ReleasedForm(copy.deepcopy(ce))
    x = torch.randn(2, 32, 6, 5, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ce(a), released(b)
    out.square().sum().backward(), expected.square().sum().backward()
    assert_agree(out, expected, 1e-9)
    assert_agree(a.grad, b.grad, 1e-9)


def test_released_backbone_equals_ours():
    backbone = randomize(CEResNet(depth=18, base_channels=16)).eval()
    x = torch.randn(1, 3, 32, 32)
    for a, b in zip(backbone(x), models.with_released_form(backbone)(x)):
        assert_agree(a, b, 1e-4)


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize(('rival', 'parameter'), [('gc', 'channel_add_conv.3.bias'), ('se', 'conv2.conv.bias')])
def test_a_rival_takes_part_in_every_block_that_has_one(depth, rival, parameter):
    network = models.RivalResNet(depth, rival)
    network.eval()  # mmdet's returns nothing
    x = torch.randn(1, 3, 32, 32)
    with_rival = [name for name, _ in network.named_parameters() if name.endswith(f'1.{parameter}') and '.bn' in name]
    assert len(with_rival) == sum(network.stage_blocks[rival == 'gc' :])
    for name in with_rival:
        before = network(x)[-1]
        with torch.no_grad():
            network.get_parameter(name).add_(1)
        assert not torch.allclose(network(x)[-1], before), name


@pytest.mark.slow
def test_command_prints_a_table_for_each_comparison(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_ce, 'BLOCKS', {(2, 32, 64, 64): 16})
    arguments = ['--depth', 18, '--size', 64, 64, '--rounds', 2, '--rivals']
    assert call(benchmark_ce.main, *arguments) is None
    printed = capsys.readouterr().out
    assert f'torch {torch.__version__}' in printed
    tables = printed.split('\n\n| |')[1:]
    assert len(tables) == 2
    names = [[line.split(' | ')[0] for line in table.splitlines()[2:] if line.startswith('| ')] for table in tables]
    assert names[0] == ['| CE, released form', '| CE', '| BatchNorm2d']
    assert {'| plain ResNet', '| CE', '| CE, released form', '| plain + SE', '| plain + ContextBlock'} <= set(names[1])
    for table in tables:
        for line in (line for line in table.splitlines()[2:] if line.startswith('| ')):
            cells = line.strip('| ').split(' | ')
            assert len(cells) == 7 and all(float(cell.split()[0]) > 0 for cell in cells[1:5])
