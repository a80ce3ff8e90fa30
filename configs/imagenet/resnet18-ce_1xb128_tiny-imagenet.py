_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
# A ResNet-18 of half width on 64x64 images, with a folder for each class. Two CPU cores can train it.
# Another folder, or a part of the classes: --cfg-options train_dataloader.dataset.data_root=DIR
# val_dataloader.dataset.data_root=DIR model.head.num_classes=N data_preprocessor.num_classes=N
num_classes = 200
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmdet.CEResNet', depth=18, base_channels=32, out_indices=(3,), frozen_stages=-1, norm_eval=False
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=num_classes,
        in_channels=256,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5),
    ),
)
data_preprocessor = dict(
    num_classes=num_classes, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=64, padding=8),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
dataset = dict(type='CustomDataset', data_root='data/tiny-imagenet')
train_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    dataset=dict(data_prefix='train', pipeline=train_pipeline, **dataset),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    dataset=dict(data_prefix='val', pipeline=test_pipeline, **dataset),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

max_epochs = 10
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.2, momentum=0.9, weight_decay=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=1, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(max_keep_ckpts=2))
