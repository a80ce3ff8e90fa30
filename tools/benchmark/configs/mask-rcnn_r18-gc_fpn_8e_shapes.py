_base_ = '../../../configs/demo/mask-rcnn_r18-ce_fpn_8e_shapes.py'
# mmcv's ContextBlock in mmdet's ResNet, to compare CE with. Trains with tools/train.py, which finds the import.
custom_imports = dict(imports=['mmdet_ce', 'benchmark.models'], allow_failed_imports=False)
model = dict(backbone=dict(type='RivalResNet', rival='gc'))
