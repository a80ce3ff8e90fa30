_base_ = 'mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
# Averages the statistics of BatchNorm and CE over the GPUs before each validation.
custom_hooks = [dict(type='SyncBuffersHook')]
# Weights: torchvision's plain ResNet-101, because no ResNet-101 with CE was released. CE is untrained at the start.
# Norms and CE train, and no stage is frozen. Not run on COCO.
model = dict(
    backbone=dict(
        type='CEResNet',
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=dict(type='Pretrained', checkpoint='https://download.pytorch.org/models/resnet101-63fe2227.pth'),
    )
)
