_base_ = 'mmdet::mask_rcnn/mask-rcnn_x101-32x4d_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
custom_hooks = [dict(type='SyncBuffersHook')]  # before validation: the mean of the GPUs' statistics
# Weights: the plain ResNeXt-101 of mmdet's config. CE starts as the identity and grows in, on the batch's statistics
# beside frozen norms; so no stage is frozen, which would keep its CE untouched.
model = dict(
    backbone=dict(type='CEResNeXt', ce_cfg=dict(num_channels=16, identity_start=True), ce_eval=False, frozen_stages=-1)
)
