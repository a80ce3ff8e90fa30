_base_ = 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_ce'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(backend_args=dict(backend='atomic')))
custom_hooks = [dict(type='SyncBuffersHook')]  # averages running values over the GPUs before validation
# Weights: torchvision's plain ResNet-101, since none with CE were released; CE starts untrained. So nothing is frozen
# and CE and the norms see the batch's statistics. Not run on COCO.
model = dict(backbone=dict(type='CEResNet', frozen_stages=-1, norm_eval=False))
