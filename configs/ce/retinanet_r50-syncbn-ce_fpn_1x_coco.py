_base_ = './retinanet_r50-ce_fpn_1x_coco.py'
# The backbone's norms train on the images of all GPUs, and CE with them, each GPU on the statistics of its own images.
model = dict(backbone=dict(norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=False))
