_base_ = './mask-rcnn_r18-ce_fpn_8e_shapes.py'
# The plain baseline of the demo: mmdet's own ResNet.
model = dict(backbone=dict(type='ResNet'))
