# Facades of buildings, 442 images to train, 108 to test (docs/does_it_help.md), from weights or from scratch, on a CPU.
_base_ = '../custom/mask-rcnn_r50-ce_fpn_custom.py'
data_root = 'data/facade/'
metainfo = dict(
    classes=(
        'balcony-fence',
        'car',
        'facade',
        'fence',
        'non-building-infrastructure',
        'shop',
        'street',
        'traffic-infrastructure',
        'vegetation',
        'window',
    )
)
num_classes = len(metainfo['classes'])
model = dict(
    backbone=dict(_delete_=True, type='CEResNet', depth=18, base_channels=32, frozen_stages=-1, norm_eval=False),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=num_classes),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = param_scheduler[1].T_max = max_epochs
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (320, 320)
shared = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **shared))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **shared))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + _base_.val.ann_file)
test_evaluator = val_evaluator
