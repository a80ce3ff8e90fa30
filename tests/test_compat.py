"""What an older torch lacks is said; autocast is off on every type of device."""

from __future__ import annotations

import pytest
import torch

from mmdet_ce import compat


@pytest.mark.parametrize('text, version', [('2.13.0+cpu', (2, 13)), ('2.1.2', (2, 1)), ('2.6.0a0+gitabc', (2, 6))])
def test_versions(text, version):
    assert compat.version_of(text) == version


def test_an_older_torch_lacks_more():
    assert compat.missing_features((2, 13)) == []
    assert compat.missing_features((2, 6)) == ['the Triton form on a GPU (torch 2.7)']
    assert len(compat.missing_features((2, 1))) == len(compat.FEATURES)


def test_autocast_is_off_within():
    with torch.autocast('cpu', torch.bfloat16), compat.without_autocast('cpu'):
        assert not torch.is_autocast_cpu_enabled()
    with compat.without_autocast('meta'):  # which has no autocast
        pass


@pytest.mark.skipif(compat.TORCH < (2, 4), reason='an older torch cannot be asked')
@pytest.mark.parametrize('device_type', ['xpu', 'hpu'])
@pytest.mark.parametrize('version', [(2, 1), (2, 13)])
def test_autocast_is_off_on_devices_that_are_neither_cuda_nor_the_cpu(device_type, version, monkeypatch):
    monkeypatch.setattr(compat, 'TORCH', version)
    torch.set_autocast_enabled(device_type, True)
    try:
        with compat.without_autocast(device_type):
            assert not torch.is_autocast_enabled(device_type)
        assert torch.is_autocast_enabled(device_type)
    finally:
        torch.set_autocast_enabled(device_type, False)
