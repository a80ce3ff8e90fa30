_base_ = './mask-rcnn_r18-ce_fpn_8e_shapes.py'
# For weights of a plain ResNet: name them with model.backbone.init_cfg.
model = dict(backbone=dict(ce_cfg=dict(num_channels=16, identity_start=True)))
