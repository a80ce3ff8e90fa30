_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
custom_hooks = [dict(type='SyncBuffersHook')]  # averages running values over the GPUs before validation
# Weights: OpenMMLab's plain MobileNetV2. identity_start leaves the network as it is at step 0.
model = dict(
    backbone=dict(_delete_=True, type='CEMobileNetV2', ce_cfg=dict(num_channels=16, identity_start=True)),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
model['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2')
