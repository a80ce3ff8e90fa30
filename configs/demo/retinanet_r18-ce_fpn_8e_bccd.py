# Blood cells, 292 images to train and 72 to test (docs/does_it_help.md), from weights or from scratch, on a CPU.
_base_ = '../custom/retinanet_r50-ce_fpn_custom.py'
data_root = 'data/bccd/'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))
val = dict(ann_file='annotations/test.json', data_prefix=dict(img='test/'))
num_classes = len(metainfo['classes'])
model = dict(
    backbone=dict(_delete_=True, type='CEResNet', depth=18, base_channels=32, frozen_stages=-1, norm_eval=False),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    bbox_head=dict(num_classes=num_classes, in_channels=64, feat_channels=64, stacked_convs=2),
)
max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = param_scheduler[1].T_max = max_epochs
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (320, 240)
shared = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **shared))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **shared, **val))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val['ann_file'])
test_evaluator = val_evaluator
