_base_ = './resnet50-ce_8xb32_in1k.py'
# The plain baseline, by the same recipe and the same class.
model = dict(backbone=dict(ce_cfg=None))
