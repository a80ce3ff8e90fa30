"""The line that a load logs: what came in, a warning where CE or everything is lost, an error for other shapes."""

from __future__ import annotations

import logging

import pytest
import torch
from mmdet.models import MobileNetV2, ResNet
from mmengine.logging import MMLogger
from mmengine.runner import load_state_dict
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
        (ce(), plain(), '100 of 156', '56 of 56', 'plain weights under an untrained CE'),
        (ce(**IDENTITY), plain(), '100 of 163', '63 of 63', 'plain weights; CE starts as the identity and grows in'),
        (CEMobileNetV2(), MobileNetV2(), '260 of 396', '136 of 136', 'plain weights under an untrained CE'),
        (ce(), ce(), '156 of 156', '0 of 56', 'CE is loaded with its statistics'),
        (ce(), ce(stem_with_ce=False), '148 of 156', '8 of 56', 'CE is loaded in part'),
        (ce(**IDENTITY), ce(), '156 of 163', '7 of 63', 'CE is loaded in part'),
        (ce(in_channels=4), plain(), '99 of 156', '56 of 56', 'plain weights'),
    ],
)
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_what_came_in(model, given, loaded, missing, meaning, prefix, log, recwarn):
    """Into a backbone (init_cfg), and into a detector (load_from, resume, test)."""
    state = {prefix + key: t for key, t in {**given.state_dict(), 'fc.weight': torch.zeros(1)}.items()}
    load_state_dict(nn.ModuleDict(dict(backbone=model)) if prefix else model, state, logger='silent')
    line = f"{loaded} tensors loaded, {missing} CE tensors missing, 1 unexpected (like 'fc.weight'): {meaning}"
    assert line in line_of(log) and not [w for w in recwarn if 'CE tensors' in str(w.message)]


WEIGHTS = plain().state_dict()
OFFICIAL = {f'layer1.0.ce.{name}': torch.zeros(1) for name in BLOCK_NAMES}
LOST = [
    (ce(), ce(**IDENTITY).state_dict(), "7 CE tensors .* like 'ce1.alpha'.* use the ce_cfg"),
    (ce(stem_with_ce=False), ce().state_dict(), "8 CE tensors .* like 'ce1.theta'.* stem_with_ce"),
    (ce(ce_cfg=None), ce().state_dict(), 'set ce_cfg, which is None'),
    (ce(), {**WEIGHTS, **OFFICIAL}, 'official_to_mmdet_ce.py'),
    (ce(), {f'module.{key}': t for key, t in {**WEIGHTS, **OFFICIAL}.items()}, 'official_to_mmdet_ce.py'),
    (ce(), {f'backbone.{key}': t for key, t in ce().state_dict().items()}, "add prefix='backbone.' to init_cfg"),
    (ce(), {f'model.encoder.{key}': t for key, t in WEIGHTS.items()}, "add prefix='model.encoder.' to init_cfg"),
    (ce(), {'epoch': 3, 'model': WEIGHTS}, "the weights may be under 'model'"),
    (
        ce(),
        {'patch_embed\x1b[2J.weight': torch.zeros(3)},
        r'patch_embed\\x1b\[2J.weight.*expected weights of this arch',
    ),
    (nn.ModuleDict(dict(backbone=ce())), WEIGHTS, "no name begins with 'backbone.'; .* init_cfg"),
]


@pytest.mark.parametrize('model, state, message', LOST, ids=[message for *_, message in LOST])
def test_what_is_lost_is_a_warning_in_the_log_too(model, state, message, log):
    with pytest.warns(UserWarning, match=message) as caught:
        load_state_dict(model, state, logger='silent')
    assert line_of(log, logging.WARNING) in map(str, (warning.message for warning in caught))


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(ce_cfg=dict(num_channels=32)), 'num_channels: 32 in the file, 16 here'),
        (dict(ce_cfg=dict(reduction=8)), 'reduction: 8 in the file, 4 here'),
        (dict(base_channels=32), r'expected weights of this architecture .* in the file, \(.*\) here'),
    ],
)
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_ce_of_another_shape_is_an_error_that_names_the_argument(given, message, prefix):
    """mmengine would leave out what does not fit, and go on."""
    model = nn.ModuleDict(dict(backbone=ce())) if prefix else ce()
    state = {prefix + key: t for key, t in ce(**given).state_dict().items()}
    for load in (load_state_dict, type(model).load_state_dict):
        with pytest.raises(RuntimeError, match=f'CEResNet-18: CE has another shape in the file; {message}'):
            load(model, state)


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
