"""mmengine's EMAHook over a CE backbone: parameters and statistics are averaged or kept, and survive a resume."""

from __future__ import annotations

import pytest
import torch
from mmengine.hooks import Hook
from small_runner import Model, runner

from mmdet_ce.checkpoints import read_checkpoint

MOMENTUM = 0.25


class Record(Hook):
    """Keeps what the model holds after each iteration, before the average is taken."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.states = []

    def after_train_iter(self, runner, *args, **kwargs):
        self.states.append({key: t.clone() for key, t in runner.model.state_dict().items()})


@pytest.mark.parametrize('update_buffers', [True, False])
def test_ema(tmp_path, update_buffers):
    record = Record()
    ema = dict(type='EMAHook', momentum=MOMENTUM, update_buffers=update_buffers)
    options = dict(custom_hooks=[record, ema])
    run = runner(tmp_path, **options)
    for ce in dict(run.model.backbone.named_ce()).values():
        ce.train()
    run.model.backbone.norm_eval = False
    run.train()

    parameters = {name for name, _ in Model().named_parameters()}
    first, second = record.states
    saved = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert saved['state_dict'].keys() == second.keys()
    for key, value in saved['state_dict'].items():
        if not value.is_floating_point():  # BatchNorm's count of batches: no average
            continue
        averaged = update_buffers or key in parameters
        expected = first[key].lerp(second[key], MOMENTUM) if averaged else second[key]
        assert torch.equal(value, expected), key
    moved = 'backbone.ce1.bd.running_whitening'
    assert not torch.equal(first[moved], second[moved])
    assert torch.equal(saved['ema_state_dict'][f'module.{moved}'], second[moved])

    resumed = runner(tmp_path, num_epochs=2, resume=True, **options)
    resumed.call_hook('before_run')
    resumed.load_or_resume()
    assert all(torch.equal(t, second[key]) for key, t in resumed.model.state_dict().items())
