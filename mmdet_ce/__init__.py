"""Channel Equilibrium backbones for MMDetection.

Importing the package registers them in ``mmdet.registry.MODELS``, and lets ``torch.load`` read mmengine's checkpoints
as data.
"""

from .environment import check_environment
from .version import __version__

check_environment()

from .backbones import CEMobileNetV2, CEResNet, CEResNetV1d, CEResNeXt  # noqa: E402
from .checkpoints.safe_globals import admit_training_checkpoints  # noqa: E402
from .hooks import CECalibrationHook, ChannelStatisticsHook  # noqa: E402
from .layers import ChannelEquilibrium  # noqa: E402

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
