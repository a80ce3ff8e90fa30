"""The calibration hook in a real Runner."""

from __future__ import annotations

import pytest
import torch
from small_runner import runner

from mmdet_ce.checkpoints import read_checkpoint


def statistics(state_dict):
    return {key: t.clone() for key, t in state_dict.items() if 'running_whitening' in key}


@pytest.mark.parametrize('sampler, last', [('DefaultSampler', 'epoch_1.pth'), ('InfiniteSampler', 'iter_2.pth')])
def test_calibrates_and_training_keeps_it(tmp_path, sampler, last):
    """With norm_eval=True nothing but the hook moves the statistics, and what is saved is what it set."""
    hook = dict(type='CECalibrationHook', num_batches=2)
    run = runner(tmp_path, sampler=sampler, custom_hooks=[hook])
    run.train()
    final = statistics(run.model.state_dict())
    eye = torch.eye(final['backbone.ce1.bd.running_whitening'].shape[-1])
    assert not torch.allclose(final['backbone.ce1.bd.running_whitening'][0], eye)
    saved = statistics(read_checkpoint(tmp_path / last)['state_dict'])
    assert all(torch.equal(value, saved[key]) for key, value in final.items())

    resumed = runner(tmp_path, num_epochs=2, sampler=sampler, custom_hooks=[hook], resume=True)
    resumed.train()
    assert all(torch.equal(value, final[key]) for key, value in statistics(resumed.model.state_dict()).items())
