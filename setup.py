"""Packaging of mmdet_ce; the metadata is here, the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
# The configs lie beside the package in the repository and inside it when installed (python -m mmdet_ce finds both).
config_folders = sorted({path.parent.name for path in root.glob('configs/*/*.py')})
config_packages = {f'mmdet_ce.configs.{name}': f'configs/{name}' for name in config_folders}
version = re.search(r"__version__ = '(.+)'", (root / 'mmdet_ce' / 'version.py').read_text())[1]

setup(
    name='mmdet_ce',
    version=version,
    description='Channel Equilibrium (ICML 2020) ResNet backbones for MMDetection',
    long_description=(root / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.8',
    packages=[*find_packages(include=['mmdet_ce', 'mmdet_ce.*']), *config_packages],
    package_dir=config_packages,
    # On purpose without torch, mmengine, mmcv and mmdet: a dependency could replace the user's own build or fork of
    # them. mmdet_ce/environment.py checks what is installed when the package is imported.
    install_requires=[],
    extras_require={'deploy': ['onnx', 'onnxruntime', 'onnxscript'], 'imagenet': ['mmpretrain>=1.2']},
)
