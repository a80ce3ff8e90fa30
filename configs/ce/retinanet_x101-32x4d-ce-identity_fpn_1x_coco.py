_base_ = 'mmdet::retinanet/retinanet_x101-32x4d_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
custom_hooks = [dict(type='SyncBuffersHook')]  # averages running values over the GPUs before validation
# Weights: the plain ResNeXt-101 of mmdet's config. identity_start leaves the network
# as it is at step 0. CE uses the batch's statistics beside frozen norms. No stage is frozen, so that every CE learns.
model = dict(
    backbone=dict(type='CEResNeXt', ce_cfg=dict(num_channels=16, identity_start=True), ce_eval=False, frozen_stages=-1)
)
