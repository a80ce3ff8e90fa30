_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
custom_hooks = [dict(type='SyncBuffersHook')]  # averages running values over the GPUs before validation
# Weights: torchvision's plain ResNet-50. identity_start leaves the network as it
# is at step 0. CE uses the batch's statistics beside frozen norms. No stage is frozen, so that every CE learns.
model = dict(
    backbone=dict(type='CEResNet', ce_cfg=dict(num_channels=16, identity_start=True), ce_eval=False, frozen_stages=-1)
)
