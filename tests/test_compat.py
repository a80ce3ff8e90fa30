"""What differs between the versions of torch."""

from __future__ import annotations

import pytest
import torch

from mmdet_ce import compat


@pytest.mark.parametrize('text, version', [('2.13.0+cpu', (2, 13)), ('2.1.2', (2, 1)), ('2.6.0a0+gitabc', (2, 6))])
def test_versions(text, version):
    assert compat.version_of(text) == version


def test_autocast_is_off_within():
    with torch.autocast('cpu', torch.bfloat16), compat.without_autocast('cpu'):
        assert not torch.is_autocast_cpu_enabled()
    with compat.without_autocast('meta'):  # which has no autocast
        pass
