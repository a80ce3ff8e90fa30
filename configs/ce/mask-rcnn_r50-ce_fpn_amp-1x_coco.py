_base_ = './mask-rcnn_r50-ce_fpn_1x_coco.py'
# Automatic mixed precision. CE computes its statistics in float32.
optim_wrapper = dict(type='AmpOptimWrapper')
