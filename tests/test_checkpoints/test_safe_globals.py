"""What mmengine's trainings save loads as data, equal to the pickle in every part, and nothing else is admitted."""

from __future__ import annotations

import copy
import io
import pickle
import pkgutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType

import hostile
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from small_runner import runner

from mmdet_ce.checkpoints import safe_globals
from mmdet_ce.compat import TORCH

pytestmark = pytest.mark.skipif(TORCH < (2, 6), reason='torch < 2.6 unpickles checkpoints')


@pytest.fixture(autouse=True)
def _as_without_the_tools(monkeypatch):
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)


class Numbers(Hook):
    """Puts numbers of numpy where mmengine's own hooks put the numbers of metrics."""

    def after_train_iter(self, runner, *args, **kwargs):
        numbers = [np.float64(0.5), np.float32(2), np.int64(-3), np.bool_(True), np.float16(1), np.complex64(1j)]
        arrays = [np.zeros(0), np.arange(3, dtype='>i4'), np.arange(6.0).reshape(2, 3).T, np.array(1)]
        runner.message_hub.update_info('numbers', numbers + arrays)


def make_runner(work_dir, num_epochs, **kwargs):
    schedule = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=2),
        dict(type='OneCycleLR', eta_max=0.01, total_steps=12, by_epoch=False),
        dict(type='MultiStepLR', milestones=[1], by_epoch=True),
    ]
    hooks = [dict(type='EMAHook', momentum=0.1), Numbers()]
    return runner(work_dir, num_epochs, param_scheduler=schedule, custom_hooks=hooks, **kwargs)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A training of two epochs, and its last checkpoint."""
    run = make_runner(tmp_path_factory.mktemp('run'), 2)
    run.train()
    return run, f'{run.work_dir}/epoch_2.pth'


def assert_same(first, second, where: str = '') -> None:
    """Assert that two trees are equal in types and values, and their functions in what they return."""
    if callable(first):
        assert callable(second) and first(1.0, 3.0, 0.25) == second(1.0, 3.0, 0.25), where
        return
    assert type(first) is type(second) or isinstance(first, np.ndarray), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, (np.ndarray, np.generic)):
        assert first.dtype == second.dtype and first.flags.c_contiguous == second.flags.c_contiguous, where
        assert np.array_equal(first, second), where
    elif isinstance(first, HistoryBuffer):
        assert_same((*first.data, first.max_length), (*second.data, second.max_length), where)
    elif isinstance(first, dict):
        assert [*first] == [*second], where
        for key in first:
            assert_same(first[key], second[key], f'{where}.{key}')
        assert_same(getattr(first, '_metadata', None), getattr(second, '_metadata', None), f'{where}._metadata')
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second)):
            assert_same(one, other, f'{where}.{index}')
    else:
        assert first == second, where


def test_a_training_loads_equal_to_its_pickle(trained, tmp_path):
    path = trained[1]
    loaded = torch.load(path)
    assert {'message_hub', 'ema_state_dict', 'optimizer', 'param_schedulers'} < loaded.keys()
    assert loaded['state_dict']._metadata['backbone']['ce_cfg']['num_iterations'] == [3], 'under EMAHook too'
    assert type(loaded['param_schedulers'][2]['milestones']) is Counter
    assert_same(loaded, torch.load(path, weights_only=False))
    torch.save(loaded, tmp_path / 'again.pth')
    assert_same(loaded, torch.load(tmp_path / 'again.pth'))


def test_beside_the_real_names_that_a_user_admitted(trained):
    """As the advice for mmengine's checkpoints goes; torch leaves to chance which of two objects a name means."""
    parts = [np.float64(1).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    dtypes = {type(np.dtype(code)) for code in '?bhilqBHILQefdFD'}
    with torch.serialization.safe_globals([HistoryBuffer, getattr, np.ndarray, np.dtype, *parts, *dtypes]):
        assert_same(torch.load(trained[1]), torch.load(trained[1], weights_only=False))


class Start(Hook):
    """Keeps the state that a training starts from."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.step = runner.epoch, runner.iter
        self.states = copy.deepcopy((runner.model.state_dict(), runner.optim_wrapper.state_dict()))


def test_mmengine_resumes(trained):
    run, _ = trained
    resumed, start = make_runner(Path(run.work_dir), 3, resume=True), Start()
    resumed.register_hook(start)
    resumed.train()
    assert start.step == (2, 4) and resumed.iter == 6
    assert_same(start.states, (run.model.state_dict(), run.optim_wrapper.state_dict()))


@pytest.mark.parametrize('name', [*hostile.live(Path()), *hostile.forged()])
@pytest.mark.parametrize('kwargs', [{}, dict(_use_new_zipfile_serialization=False)], ids=['zip', 'before torch 1.6'])
def test_hostile_files_are_refused(name, kwargs, tmp_path):
    path, marker = tmp_path / 'a.pth', tmp_path / 'marker'
    live = hostile.live(marker)
    torch.save({'state_dict': {}, 'a': {**live, **hostile.forged()}[name]}, path, **kwargs)
    with pytest.raises(pickle.UnpicklingError, match='Weights only load failed'):
        CheckpointLoader.load_checkpoint(str(path), logger='silent')
    assert not marker.exists()
    if name in live:
        torch.load(path, weights_only=False)
        assert marker.exists(), 'the file attacks nobody'


def attributes(objects):
    """Return what a file must not change: the attributes of classes, modules and functions."""
    found = [vars(value).copy() for value in objects if hasattr(value, '__dict__')]
    return found, dict(HistoryBuffer._statistics_methods)


def test_no_file_changes_a_class_a_module_or_a_function(monkeypatch):
    """Every admitted name on every other, through all of torch that sets attributes."""
    admitted = {pkgutil.resolve_name(name): None for _, name in safe_globals.SAFE_GLOBALS if '.core.' not in name}
    watched = [*admitted, *vars(safe_globals).values(), torch, torch.Tensor, torch.nn.Parameter, np, pickle]
    watched += [function for function in vars(HistoryBuffer).values() if callable(function)]
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', dict(HistoryBuffer._statistics_methods))
    HistoryBuffer()  # the first one fills the statistics of its class
    before = attributes(watched)
    for name, content in hostile.changes([*admitted]):
        file = io.BytesIO()
        torch.save(content, file)
        file.seek(0)
        with suppress(pickle.UnpicklingError, AttributeError, TypeError, KeyError):  # by torch, or Python on the way
            loaded = torch.load(file, weights_only=True)
            assert not isinstance(loaded, (type, FunctionType, BuiltinFunctionType, ModuleType)), name
        assert attributes(watched) == before, name
