_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
# Averages the statistics of BatchNorm and CE over the GPUs before each validation.
custom_hooks = [dict(type='SyncBuffersHook')]
# Weights: OpenMMLab's plain MobileNetV2, with identity_start (docs/usage.md). Norms and CE train.
model = dict(
    backbone=dict(_delete_=True, type='CEMobileNetV2', ce_cfg=dict(num_channels=16, identity_start=True)),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
model['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2')
