_base_ = './mask-rcnn_r18-ce_fpn_8e_shapes.py'
# For weights of a plain ResNet: name them with model.backbone.init_cfg.
model = dict(backbone=dict(ce_cfg=dict(num_channels=16, identity_start=True)))
# AdamW moves a parameter by about its learning rate in a step. Alpha would end at 0.03, so its rate is 10 times larger.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(alpha=dict(lr_mult=10))))
