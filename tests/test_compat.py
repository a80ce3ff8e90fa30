"""What an older torch lacks is said, and nothing of a newer one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from mmdet_ce import compat


@pytest.mark.parametrize('text, version', [('2.13.0+cpu', (2, 13)), ('2.0.1', (2, 0)), ('2.6.0a0+gitabc', (2, 6))])
def test_versions(text, version):
    assert compat.version_of(text) == version


def test_an_older_torch_lacks_more():
    assert compat.missing_features((2, 13)) == []
    assert compat.missing_features((2, 6)) == ['the Triton form on a GPU (torch 2.7)']
    assert len(compat.missing_features((2, 0))) == len(compat.FEATURES)


def test_what_torch_load_does_is_said_once_where_it_runs_code():
    with pytest.warns(UserWarning, match=r'torch.load of torch 2\.1 runs what a checkpoint says') as caught:
        compat.warn_of_torch_load((2, 1))
    assert len(caught) == 1 and '\n' not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        compat.warn_of_torch_load((2, 6))


def test_autocast_is_seen():
    assert not compat.is_autocast_enabled('cpu') and not compat.is_autocast_enabled('meta')
    with torch.autocast('cpu', torch.bfloat16):
        assert compat.is_autocast_enabled('cpu')


def test_hooks_of_every_module_are_seen():
    assert not compat.has_global_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert compat.has_global_hooks()
    handle.remove()
