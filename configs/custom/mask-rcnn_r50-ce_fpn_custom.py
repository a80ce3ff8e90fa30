# Mask R-CNN with CE on your own data in COCO's format, with masks. Change parts 1 to 4, then run tools/train.py.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)

# 1. Your data: a folder, a JSON file of annotations and a folder of images for each part, and the classes.
data_root = 'data/custom/'
metainfo = dict(classes=('first', 'second'))  # a single one: ('first',); palette=[(R, G, B), ...] sets colours
train = dict(ann_file='annotations/train.json', data_prefix=dict(img='train/'))
val = dict(ann_file='annotations/val.json', data_prefix=dict(img='val/'))

# 2. The network: plain ImageNet weights. CE is untrained at the start. Norms and CE train, and no stage is frozen.
# docs/your_data.md has the other settings. Another depth needs other weights and channels, for example depth=18, its
# init_cfg, and neck=dict(in_channels=[64, 128, 256, 512]).
num_classes = len(metainfo['classes'])
model = dict(
    backbone=dict(
        type='CEResNet',
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=dict(type='Pretrained', checkpoint='https://download.pytorch.org/models/resnet50-0676ba61.pth'),
    ),
    roi_head=dict(bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes)),
)

# 3. Images: the longer and the shorter side at most.
scale = (640, 480)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
shared = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline, **shared, **train))
# One image at a time: CE's gate sees the padding of a smaller image beside a larger one.
val_dataloader = dict(batch_size=1, dataset=dict(pipeline=test_pipeline, **shared, **val))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val['ann_file'])
test_evaluator = val_evaluator

# 4. The training, for a small set and pretrained weights. From scratch, train 3 times as many epochs.
max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=10)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, end=max_epochs, T_max=max_epochs, convert_to_iter_based=True),
]
# Averages the statistics of BatchNorm and CE over the GPUs before each validation.
custom_hooks = [dict(type='SyncBuffersHook')]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(max_keep_ckpts=2, save_best='auto', backend_args=dict(backend='atomic')),
)
