"""Channel Equilibrium backbones for MMDetection.

Importing the package registers them in ``mmdet.registry.MODELS``, and lets ``torch.load`` read mmengine's checkpoints
as data.
"""

import sys

from .version import __version__

if sys.argv[:1] != ['-m']:  # python -m mmdet_ce: Python is about to run __main__.py, which lists configs without torch
    from .environment import check_environment

    check_environment()

    from .backbones import CEMobileNetV2, CEResNet, CEResNetV1d, CEResNeXt
    from .checkpoints.safe_globals import admit_training_checkpoints
    from .hooks import CECalibrationHook, ChannelStatisticsHook
    from .layers import ChannelEquilibrium

    admit_training_checkpoints()

__all__ = [
    'CECalibrationHook',
    'CEMobileNetV2',
    'CEResNeXt',
    'CEResNet',
    'CEResNetV1d',
    'ChannelEquilibrium',
    'ChannelStatisticsHook',
    '__version__',
]
