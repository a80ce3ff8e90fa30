_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
# The authors' recipe: mmpretrain's (100 epochs, batch 256, SGD 0.1, tenths from epochs 30, 60, 90) with 5 of warm-up.
model = dict(
    backbone=dict(_delete_=True, type='mmdet.CEResNet', depth=50, out_indices=(3,), norm_eval=False, style='pytorch')
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='MultiStepLR', by_epoch=True, milestones=[30, 60, 90], gamma=0.1),
]
