"""Channel Equilibrium backbones for MMDetection.

Importing the package registers them in ``mmdet.registry.MODELS``, and lets mmengine read checkpoints as data.
"""

from .environment import check_environment
from .version import __version__

check_environment()

from .backbones import CEMobileNetV2, CEResNet, CEResNetV1d, CEResNeXt  # noqa: E402
from .checkpoints import register_loaders  # noqa: E402
from .hooks import AtomicCheckpointHook, CECalibrationHook, ChannelStatisticsHook  # noqa: E402
from .layers import ChannelEquilibrium  # noqa: E402

register_loaders()

__all__ = [
    'AtomicCheckpointHook',
    'CECalibrationHook',
    'CEMobileNetV2',
    'CEResNeXt',
    'CEResNet',
    'CEResNetV1d',
    'ChannelEquilibrium',
    'ChannelStatisticsHook',
    '__version__',
]
