"""AtomicCheckpointHook in the place of mmengine's CheckpointHook: the same schedules leave the same things."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from checkpoint_runs import FolderRunner, files, make_runner, outcome
from mmdet.registry import HOOKS
from mmengine.fileio import FileClient, LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import Registry, init_default_scope

from mmdet_ce import AtomicCheckpointHook

BOTH = ('CheckpointHook', 'AtomicCheckpointHook')
ARGUMENTS = inspect.signature(CheckpointHook.__init__).parameters


@pytest.fixture(autouse=True)
def _scope():
    """The trainings here run in mmengine's own scope; other tests in mmdet's."""
    yield
    init_default_scope('mmdet')


SCHEDULES = {
    'every second epoch': dict(interval=2),
    'not the last one': dict(interval=2, save_last=False),
    'the last one alone': dict(),
    'from epoch 3 on': dict(interval=2, save_begin=3),
    'from epoch 2 on, one kept': dict(interval=2, save_begin=2, max_keep_ckpts=1),
    'two kept': dict(interval=1, max_keep_ckpts=2),
    'no optimizer': dict(interval=1, save_optimizer=False, save_param_scheduler=False),
    'other names': dict(interval=2, filename_tmpl='at_{}.pth', save_best='acc'),
    'another folder': dict(interval=1, out_dir='OUT', max_keep_ckpts=2, save_best='acc'),
    'best, first metric': dict(interval=2, save_best='auto'),
    'best, greater': dict(interval=1, save_best='acc', max_keep_ckpts=1),
    'best, less': dict(interval=-1, save_best='loss'),
    'best, a rule': dict(interval=2, save_best='acc', rule='less'),
    'best, keys of the user': dict(interval=2, save_best='speed', greater_keys='speed', less_keys=['x']),
    'best of two': dict(interval=2, save_best=['acc', 'loss'], max_keep_ckpts=1),
    'best of two, rules': dict(interval=1, save_best=['acc', 'speed'], rule=['less', 'greater'], max_keep_ckpts=2),
    'published': dict(interval=1, save_best='acc', published_keys=['meta', 'state_dict'], max_keep_ckpts=2),
    'published, of two': dict(interval=1, save_best=['acc', 'loss'], published_keys='state_dict'),
    'a backend': dict(interval=1, max_keep_ckpts=1, save_best='acc', backend_args=dict(backend='local')),
    'a file client': dict(interval=1, max_keep_ckpts=1, save_best='acc', file_client_args=dict(backend='disk')),
}


def checked(hook: dict, root: Path) -> dict:
    """Fill in the folder; skip what this mmengine does not have."""
    if not set(hook) <= set(ARGUMENTS):
        pytest.skip(f'mmengine before 0.8.3 has no {set(hook) - set(ARGUMENTS)}')
    return {**hook, 'out_dir': str(root / 'out')} if 'out_dir' in hook else hook


@pytest.mark.parametrize('schedule', SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
def test_a_schedule_leaves_what_mmengines_hook_leaves(schedule, by_epoch, tmp_path):
    """The files and what is in them, the message hub, last_checkpoint, and what is said of them."""
    theirs, ours = (
        outcome(
            tmp_path / name, dict(type=name, by_epoch=by_epoch, **checked(schedule, tmp_path / name)), [5], by_epoch
        )
        for name in BOTH
    )
    assert ours == theirs
    assert theirs['files'] or not by_epoch, 'there is something to compare'


@pytest.mark.parametrize(
    'schedule, later',
    [
        (dict(interval=1, max_keep_ckpts=3), dict(max_keep_ckpts=1)),
        (dict(interval=1, max_keep_ckpts=2, save_best='acc'), {}),
        (dict(interval=1, save_best=['acc', 'loss']), dict(max_keep_ckpts=2)),
        (dict(interval=1, save_best=['acc', 'loss'], max_keep_ckpts=2, published_keys=['meta', 'state_dict']), {}),
        (dict(interval=1, out_dir='OUT', max_keep_ckpts=1, save_best='loss'), {}),
    ],
    ids=['fewer kept', 'best', 'best of two', 'published', 'another folder'],
)
@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
def test_a_resumed_schedule_leaves_what_mmengines_hook_leaves(schedule, later, by_epoch, tmp_path):
    theirs, ours = (
        outcome(
            tmp_path / name,
            dict(type=name, by_epoch=by_epoch, **checked(schedule, tmp_path / name)),
            [2, 5],
            by_epoch,
            later,
        )
        for name in BOTH
    )
    assert ours == theirs and theirs['files']


def test_metrics_of_a_prefix_and_without_a_score(tmp_path):
    scores = dict(acc=[None, 0.5, None, 0.7])
    theirs, ours = (
        outcome(tmp_path / name, dict(type=name, save_best='a/acc', interval=3), [4], scores=scores, prefix='a')
        for name in BOTH
    )
    assert ours == theirs and 'run/best_a_acc_epoch_4.pth' in theirs['files']


@pytest.mark.parametrize('save_best', ['acc', ['acc', 'loss']])
def test_checkpoints_that_are_folders(save_best, tmp_path):
    """As many stay as with mmengine's hook: DeepSpeed's would fill the disk."""
    hook = dict(interval=1, max_keep_ckpts=1, save_best=save_best)
    theirs, ours = (outcome(tmp_path / name, dict(type=name, **hook), [4], kind=FolderRunner) for name in BOTH)
    assert ours['files'] == theirs['files'] and ours['log'] == theirs['log'] and ours['hub'] == theirs['hub']
    assert 'run/epoch_4.pth/rank0.pth' in ours['files'] and 'run/epoch_3.pth/rank0.pth' not in ours['files']
    folders = {path.name for path in tmp_path.glob('AtomicCheckpointHook/run/*.pth')}
    assert folders == {path.name for path in tmp_path.glob('CheckpointHook/run/*.pth')}, 'nor are empty ones left'


def test_a_file_client_decides_where_files_go(tmp_path):
    """And which go again; nothing lies in the work directory but last_checkpoint, which mmengine reads there."""
    hook = dict(interval=1, max_keep_ckpts=1, save_best='acc')
    for name in BOTH:
        client = dict(backend='elsewhere', root=str(tmp_path / 'remote' / name))
        make_runner(tmp_path / name / 'run', dict(type=name, file_client_args=client, **hook), 3).train()
        assert not files(tmp_path / name)
        assert (tmp_path / name / 'run' / 'last_checkpoint').read_text() == str(tmp_path / name / 'run' / 'epoch_3.pth')
    kept = files(tmp_path / 'remote' / 'AtomicCheckpointHook')
    assert kept == files(tmp_path / 'remote' / 'CheckpointHook') == ['run/best_acc_epoch_2.pth', 'run/epoch_3.pth']


@pytest.mark.parametrize(
    'arguments',
    [
        dict(file_client_args=dict(backend='disk'), backend_args=dict(backend='local')),
        dict(save_best=dict(acc='acc')),
        dict(save_best=['auto', 'acc']),
        dict(save_best=['acc', 'acc']),
        dict(save_best='speed'),
        dict(save_best=['acc'], rule=1),
        dict(save_best=['acc'], rule=['greater', 'less']),
        dict(save_best='acc', rule='more'),
        dict(greater_keys=5),
        dict(published_keys=5),
        dict(published_keys=['meta', 'meta']),
        dict(save_begin=-1),
    ],
    ids=str,
)
def test_bad_arguments_get_mmengines_error(arguments):
    checked(arguments, Path())
    with pytest.raises(Exception) as theirs:
        CheckpointHook(**arguments)
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        AtomicCheckpointHook(**arguments)


@pytest.mark.parametrize(
    'arguments', [(), (2, False), (1, True, False, False, 'out', 3, False, 'acc', 'less', ['a'], ['b'])], ids=len
)
def test_positional_arguments(arguments):
    theirs, ours = vars(CheckpointHook(*arguments)), vars(AtomicCheckpointHook(*arguments))
    own = {'backend_args', '_locks'}
    compared = {key: value for key, value in theirs.items() if key not in own}
    assert {key: value for key, value in ours.items() if key not in own} == compared
    assert ours['backend_args'] == dict(backend='atomic')


@pytest.mark.parametrize('arguments', [dict(), dict(backend_args=dict(backend='local')), dict(out_dir='out')])
@pytest.mark.parametrize('save_best', [None, 'acc', ['acc', 'loss']])
def test_before_training_it_knows_what_mmengines_hook_knows(arguments, save_best, tmp_path, monkeypatch):
    """Folder, backend, and the best checkpoints that the message hub names."""
    monkeypatch.chdir(tmp_path)
    run = make_runner(tmp_path / 'run', None, 1)
    run.message_hub.update_info_dict(dict(best_ckpt='best_acc_epoch_1.pth', best_ckpt_loss='best_loss_epoch_1.pth'))
    hooks = [kind(save_best=save_best, **arguments) for kind in (CheckpointHook, AtomicCheckpointHook)]
    known = []
    for hook in hooks:
        hook.before_train(run)
        assert isinstance(hook.file_client, FileClient) and isinstance(hook.file_backend, LocalBackend)
        known.append({key: getattr(hook, key, None) for key in ('out_dir', 'best_ckpt_path', 'best_ckpt_path_dict')})
        hook.after_val_epoch(run, {})  # a warning, and nothing saved
    assert known[0] == known[1]
    assert not files(tmp_path)


def test_found_by_name_in_every_scope():
    other = Registry('hook', parent=MMENGINE_HOOKS, scope='other')
    for registry in (HOOKS, MMENGINE_HOOKS, other):
        assert registry.get('AtomicCheckpointHook') is AtomicCheckpointHook
        assert registry.get('mmdet.AtomicCheckpointHook') is AtomicCheckpointHook
