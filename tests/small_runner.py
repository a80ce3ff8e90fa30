"""A short training by mmengine's Runner."""

from __future__ import annotations

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmdet_ce import CEResNet


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
    by_epoch = sampler == 'DefaultSampler'
    length = dict(max_epochs=num_epochs) if by_epoch else dict(max_iters=2 * num_epochs)
    dataloader = dict(dataset=dict(type='Images'), batch_size=2, sampler=dict(type=sampler, shuffle=True))
    checkpoint = dict(type='CheckpointHook', interval=1, by_epoch=by_epoch, backend_args=dict(backend='atomic'))
    return Runner(
        model=Model(),
        work_dir=str(work_dir),
        cfg=Config(dict(train_dataloader=dataloader)),
        train_dataloader=dataloader,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3, momentum=0.9)),
        train_cfg=dict(by_epoch=by_epoch, **length),
        default_hooks=dict(checkpoint=checkpoint),
        default_scope='mmdet',
        experiment_name=f'{work_dir.name}-{num_epochs}-{len(kwargs)}',
        **kwargs,
    )
