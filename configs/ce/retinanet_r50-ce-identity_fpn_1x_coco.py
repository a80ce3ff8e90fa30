_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
# Averages the statistics of BatchNorm and CE over the GPUs before each validation.
custom_hooks = [dict(type='SyncBuffersHook')]
# Weights: torchvision's plain ResNet-50, with identity_start (docs/usage.md). The norms are frozen.
# CE uses the batch's statistics. No stage is frozen, because CE does not train in a frozen stage.
model = dict(
    backbone=dict(
        type='CEResNet',
        ce_cfg=dict(num_channels=16, identity_start=True),
        ce_eval=False,
        frozen_stages=-1,
        init_cfg=dict(type='Pretrained', checkpoint='https://download.pytorch.org/models/resnet50-0676ba61.pth'),
    )
)
