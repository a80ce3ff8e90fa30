_base_ = './resnet18-ce_1xb128_tiny-imagenet.py'
# The plain baseline, by the same recipe and the same class.
model = dict(backbone=dict(ce_cfg=None))
