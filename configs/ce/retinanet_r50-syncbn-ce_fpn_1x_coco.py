_base_ = './retinanet_r50-ce_fpn_1x_coco.py'
# The backbone's norms train on the images of all GPUs, and CE with them.
model = dict(backbone=dict(ce_cfg=dict(sync=True), norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=False))
