"""The line that a load logs: what came in, a warning where CE or everything is lost, an error for other shapes."""

from __future__ import annotations

import logging

import pytest
import torch
from mmdet.models import MobileNetV2, ResNet
from mmengine.logging import MMLogger
from mmengine.runner import get_state_dict, load_checkpoint, load_state_dict, save_checkpoint, weights_to_cpu
from torch import nn

from mmdet_ce import CEMobileNetV2, CEResNet
from mmdet_ce.checkpoints.official import BLOCK_NAMES

IDENTITY = dict(ce_cfg=dict(num_channels=16, identity_start=True))


def ce(**kwargs):
    return CEResNet(**{**dict(depth=18, base_channels=16), **kwargs})


def plain(**kwargs):
    return ResNet(**{**dict(depth=18, base_channels=16), **kwargs})


@pytest.fixture
def log(caplog):
    """What mmengine's logger gets."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def line_of(log, level=logging.INFO):
    """Return the one line about the backbone."""
    (record,) = [r for r in log.records if r.message.startswith('CE')]
    assert record.levelno == level and '\n' not in record.message
    log.clear()
    return record.message


@pytest.mark.parametrize(
    'model, given, loaded, missing, meaning',
    [
        (ce(), plain(), '100 of 156', '56 of 56', 'These are plain weights and CE is untrained'),
        (ce(**IDENTITY), plain(), '100 of 163', '63 of 63', 'These are plain weights; CE starts as the identity'),
        (CEMobileNetV2(), MobileNetV2(), '260 of 396', '136 of 136', 'These are plain weights and CE is untrained'),
        (ce(), ce(), '156 of 156', '0 of 56', 'CE is loaded with its statistics'),
        (ce(), ce(stem_with_ce=False), '148 of 156', '8 of 56', 'The missing CE tensors keep their values'),
    ],
)
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_what_came_in(model, given, loaded, missing, meaning, prefix, log, recwarn):
    """Into a backbone (init_cfg), and into a detector (load_from, resume, test)."""
    state = {prefix + key: t for key, t in {**given.state_dict(), 'fc.weight': torch.zeros(1)}.items()}
    load_state_dict(nn.ModuleDict(dict(backbone=model)) if prefix else model, state, logger='silent')
    line = f"{loaded} tensors loaded, {missing} CE tensors missing, 1 unexpected (like 'fc.weight'). {meaning}"
    assert line in line_of(log) and not [w for w in recwarn if 'CE tensors' in str(w.message)]


WEIGHTS = plain().state_dict()
OFFICIAL = {f'layer1.0.ce.{name}': torch.zeros(1) for name in BLOCK_NAMES}
LOST = [
    (ce(), ce(**IDENTITY).state_dict(), "7 unexpected .like 'ce1.alpha'.. CE tensors .* no place here. Use the ce_cfg"),
    (ce(ce_cfg=None), ce().state_dict(), 'CE tensors of the file have no place here. Use the ce_cfg'),
    (ce(), {**WEIGHTS, **OFFICIAL}, 'official_to_mmdet_ce.py'),
    (ce(), {f'backbone.{key}': t for key, t in ce().state_dict().items()}, "Add prefix='backbone.' to init_cfg"),
    (
        ce(),
        {'patch_embed\x1b[2J.weight': torch.zeros(3)},
        r'patch_embed\\x1b\[2J.weight.*has no weights of this backbone',
    ),
    (nn.ModuleDict(dict(backbone=ce())), WEIGHTS, 'has no weights of this backbone; .* init_cfg'),
]


@pytest.mark.parametrize('model, state, message', LOST, ids=[message for *_, message in LOST])
def test_what_is_lost_is_a_warning_in_the_log_too(model, state, message, log):
    with pytest.warns(UserWarning, match=message) as caught:
        load_state_dict(model, state, logger='silent')
    assert line_of(log, logging.WARNING) in map(str, (warning.message for warning in caught))


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(ce_cfg=dict(num_channels=32)), r'num_channels is \[16, 32\] in the file and \[16\] here'),
        (
            dict(ce_cfg=dict(reduction=8)),
            r'ce1.ir.fc1.weight is \(2, 16\) in the file and \(4, 16\) here. Use the ce_cfg',
        ),
    ],
)
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_ce_of_another_shape_is_an_error_that_names_it(given, message, prefix):
    """mmengine would leave out what does not fit, and go on."""

    def wrapped(backbone):
        return nn.ModuleDict(dict(backbone=backbone)) if prefix else backbone

    model = wrapped(ce())
    for load in (load_state_dict, type(model).load_state_dict):
        with pytest.raises(RuntimeError, match=f'CEResNet-18: CE has another shape in the file: .*{message}'):
            load(model, wrapped(ce(**given)).state_dict())


T5 = dict(ce_cfg=dict(num_channels=16, num_iterations=5))
BOTTLENECK = dict(depth=50, base_channels=8, stem_with_ce=False)


@pytest.mark.parametrize(
    'given, own, message',
    [
        (T5, {}, r'num_iterations is \[5\] in the file and \[3\] here'),
        ({}, dict(stem_ce_cfg=dict(num_iterations=8)), r'num_iterations is \[3\] in the file and \[3, 8\] here'),
        (dict(T5, depth=50, base_channels=8), dict(depth=50, base_channels=8), r'num_iterations is \[5\] in the file'),
    ],
)
@pytest.mark.parametrize('way', ['load_from', 'init_cfg', 'init_cfg with prefix'])
def test_a_file_of_another_ce_is_named(given, own, message, way, tmp_path, log):
    """T is in no tensor. mmengine writes and reads the file, as data."""
    detector = nn.ModuleDict(dict(backbone=ce(**given)))
    weights = detector['backbone'] if way == 'init_cfg' else detector
    path = str(tmp_path / 'a.pth')
    save_checkpoint(dict(state_dict=weights_to_cpu(get_state_dict(weights))), path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    with pytest.warns(UserWarning, match='The file was trained with another CE: .*' + message):
        if way == 'load_from':
            load_checkpoint(nn.ModuleDict(dict(backbone=ce(**own))), path)
        elif way == 'init_cfg':
            ce(**own, init_cfg=init_cfg).init_weights()
        else:
            ce(**own, init_cfg=dict(init_cfg, prefix='backbone.')).init_weights()


def test_the_position_is_named_where_shapes_agree(tmp_path):
    """Where planes and their expansion agree in the shapes of CE."""
    recorded = ce(**BOTTLENECK).state_dict()._metadata['']['ce_cfg']
    assert recorded == dict(num_iterations=[3], num_channels=[16], ce_position='after_norm3')
    state = ce(**BOTTLENECK, ce_position='after_norm2').state_dict()
    with pytest.raises(RuntimeError, match='ce_position is after_norm2 in the file and after_norm3 here'):
        ce(**BOTTLENECK).load_state_dict(state)


def test_the_same_ce_is_no_warning(recwarn):
    ce(**T5).load_state_dict(ce(**T5).state_dict())
    plain().load_state_dict(ce(ce_cfg=None).state_dict())
    assert not [w for w in recwarn if 'CE' in str(w.message)]


@pytest.mark.parametrize('ce_cfg', [None, dict(num_channels=16)])
def test_a_part_loads_where_strict_is_off(ce_cfg, recwarn):
    source, model = ce(ce_cfg=ce_cfg, frozen_stages=3), ce(ce_cfg=ce_cfg)
    state = source.state_dict()
    parts = [
        {},
        {key: t for key, t in state.items() if 'bn' not in key},
        {key: t for key, t in source.named_parameters() if t.requires_grad},
    ]
    for part in parts:
        model.load_state_dict(part, strict=False)
        assert all(torch.equal(t, model.state_dict()[key]) for key, t in part.items())
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict(parts[1])


@pytest.mark.parametrize('make', [ce, CEMobileNetV2, lambda: nn.ModuleDict(dict(backbone=ce()))])
def test_a_model_on_meta_takes_the_tensors_as_they_are(make):
    state = make().state_dict()
    with torch.device('meta'):
        model = make()
    model.load_state_dict(state, assign=True)
    assert all(t.data_ptr() == state[key].data_ptr() for key, t in model.state_dict().items())
