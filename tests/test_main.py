"""``python -m mmdet_ce``, and the configs of an installed, not editable, package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from mmengine.config import Config
from utils import call

from mmdet_ce.__main__ import CONFIGS, config_names, copy_config, main


def run(*arguments, **kwargs):
    command = [sys.executable, '-W', 'ignore', '-m', 'mmdet_ce', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_copies_a_config_with_its_bases(tmp_path):
    copies = copy_config('mask-rcnn_r50-ce_fpn_amp-1x_coco', tmp_path / 'new')
    assert [path.name for path in copies] == ['mask-rcnn_r50-ce_fpn_amp-1x_coco.py', 'mask-rcnn_r50-ce_fpn_1x_coco.py']
    with pytest.raises(FileExistsError, match='exists already'):
        copy_config('ce/mask-rcnn_r50-ce_fpn_1x_coco', tmp_path / 'new')
    assert call(main, 'copy', 'none') == 'error: no config named none; python -m mmdet_ce configs lists them'


@pytest.mark.parametrize('name', config_names())
def test_every_copy_is_read_where_it_lands(name, tmp_path):
    """As what it is a copy of, which test_build.py builds."""
    if name.startswith('imagenet/'):
        pytest.importorskip('mmpretrain')
    (copied, *_) = copy_config(name, tmp_path)
    assert Config.fromfile(copied).to_dict() == Config.fromfile(CONFIGS / f'{name}.py').to_dict()


@pytest.mark.slow
def test_environment_and_a_package_that_imports_this_one(tmp_path):
    text = run('env').stdout
    assert 'missing with this torch: ' in text
    assert 'mmdet_ce: ' in text and 'versions: python ' in text and 'PyTorch: ' in text and 'MMDetection: ' in text
    (tmp_path / 'mypkg').mkdir()
    (tmp_path / 'mypkg' / '__init__.py').write_text('import mmdet_ce\n')
    (tmp_path / 'mypkg' / '__main__.py').write_text(
        "from mmdet.registry import MODELS; import mmdet_ce; print(MODELS.get('CEResNet'), mmdet_ce.CEResNet)"
    )
    command = [sys.executable, '-W', 'ignore', '-m', 'mypkg']
    assert subprocess.check_output(command, text=True, cwd=tmp_path).count("ce_resnet.CEResNet'") == 2


@pytest.mark.slow
def test_installed_package_has_every_config(tmp_path):
    """Installed into a folder of its own; every config is read from there.

    Python starts beside the clone, whose name is the package's and which hides an editable installation.
    """
    command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--target']
    source = tmp_path / 'mmdet_ce'  # a build leaves its folders where it runs
    skip = shutil.ignore_patterns('.venv*', '.git', 'data', 'work_dirs', 'tests', '*.egg-info', '__pycache__')
    shutil.copytree(ROOT, source, ignore=skip)
    subprocess.run([*command, tmp_path / 'site', source], check=True)
    env = {**os.environ, 'PYTHONPATH': str(tmp_path / 'site')}
    listed = run('configs', cwd=tmp_path, env=env).stdout.splitlines()
    assert listed[:-1] == config_names() and listed[-1] == f'(in {tmp_path / "site" / "mmdet_ce" / "configs"})'
    code = (
        'import mmdet_ce.__main__ as m; from mmengine.config import Config\n'
        "paths = [p for p in m.CONFIGS.glob('*/*.py') if p.parent.name != 'imagenet']\n"
        'assert paths and m.CONFIGS.parts[-3:] == ("site", "mmdet_ce", "configs")\n'
        'for path in paths: Config.fromfile(path)'
    )
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, env=env, check=True)
