"""The calibration hook in a real Runner."""

from __future__ import annotations

import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmdet_ce import CEResNet
from mmdet_ce.checkpoints import read_checkpoint


class Model(BaseModel):
    """The least that a Runner trains: a CE backbone and a loss."""

    def __init__(self):
        super().__init__(data_preprocessor=dict(type='mmengine.ImgDataPreprocessor'))
        self.backbone = CEResNet(depth=18, base_channels=16, norm_eval=True, frozen_stages=-1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=sum(out.mean() for out in self.backbone(inputs)))


@DATASETS.register_module()
class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 32, 32), float(index)) + torch.rand(3, 32, 32))


def runner(work_dir, num_epochs=1, sampler='DefaultSampler', **kwargs):
    dataloader = dict(dataset=dict(type='Images'), batch_size=2, sampler=dict(type=sampler, shuffle=True))
    return Runner(
        model=Model(),
        work_dir=str(work_dir),
        cfg=Config(dict(train_dataloader=dataloader)),
        train_dataloader=dataloader,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
        train_cfg=(
            dict(by_epoch=True, max_epochs=num_epochs)
            if sampler == 'DefaultSampler'
            else dict(by_epoch=False, max_iters=2 * num_epochs)
        ),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=sampler == 'DefaultSampler')),
        default_scope='mmdet',
        experiment_name=f'{work_dir.name}-{num_epochs}-{len(kwargs)}',
        **kwargs,
    )


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
