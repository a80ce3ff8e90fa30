_base_ = './retinanet_r50-ce_fpn_1x_coco.py'
# The backbone's norms and CE train on the statistics of the images of all GPUs.
model = dict(backbone=dict(ce_cfg=dict(sync=True), norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=False))
