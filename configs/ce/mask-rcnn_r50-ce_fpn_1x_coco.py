_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
# Averages the statistics of BatchNorm and CE over the GPUs before each validation.
custom_hooks = [dict(type='SyncBuffersHook')]
# Weights: the authors' ImageNet CE-ResNet-50, converted (README, "Weights"). The norms and CE's statistics are frozen.
model = dict(
    backbone=dict(type='CEResNet', init_cfg=dict(type='Pretrained', checkpoint='checkpoints/ce-resnet50_imagenet.pth'))
)
