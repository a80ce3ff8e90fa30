"""AtomicCheckpointHook in the place of mmengine's CheckpointHook: the same schedules leave the same things."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import HOOKS
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import FileClient, LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import Registry, init_default_scope
from mmengine.runner import Runner

from mmdet_ce import AtomicCheckpointHook
from mmdet_ce.checkpoints import read_checkpoint

BOTH = ('CheckpointHook', 'AtomicCheckpointHook')
ARGUMENTS = inspect.signature(CheckpointHook.__init__).parameters


class Linear(BaseModel):
    """The least that a Runner trains."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)

    def forward(self, x, mode='tensor'):
        return dict(loss=self.fc(torch.stack(x)).square().mean()) if mode == 'loss' else x


class Scores(BaseMetric):
    """Scores by evaluation; the last one stays."""

    def __init__(self, scores, prefix=None, done=0):
        super().__init__(prefix=prefix)
        self.scores, self.done = scores, done

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.done += 1
        return {key: values[min(self.done, len(values)) - 1] for key, values in self.scores.items()}


SCORES = dict(acc=[0.2, 0.5, 0.4, 0.7, 0.6], loss=[5.0, 3.0, 4.0, 3.0, 2.0], speed=[1.0, 0.5, 2.0, 2.0, 0.1])


class FolderRunner(Runner):
    """Writes each checkpoint as a folder, as DeepSpeed does, and FSDP where each rank has its part."""

    def save_checkpoint(self, out_dir, filename, *args, **kwargs):
        path = Path(out_dir) / filename
        super().save_checkpoint(str(path), 'rank0.pth', *args, **kwargs)


class ElsewhereBackend(LocalBackend):
    """Puts what is named /.../FOLDER/NAME at ROOT/FOLDER/NAME, as the path_mapping of a remote backend does."""

    def __init__(self, root):
        self.root = root

    def at(self, path):
        return str(Path(self.root, *Path(path).parts[-2:]))

    def put(self, obj, filepath):
        super().put(obj, self.at(filepath))

    def isfile(self, filepath):
        return super().isfile(self.at(filepath))

    def isdir(self, filepath):
        return super().isdir(self.at(filepath))

    def remove(self, filepath):
        super().remove(self.at(filepath))


FileClient.register_backend('elsewhere', ElsewhereBackend, force=True)


@pytest.fixture(autouse=True)
def _scope():
    """The trainings here run in mmengine's own scope; other tests in mmdet's."""
    yield
    init_default_scope('mmdet')


def make_runner(work_dir, hook, until, by_epoch=True, resume=False, kind=Runner, scores=SCORES, prefix=None, done=0):
    """Return a runner of 2 iterations an epoch, which evaluates after each epoch, or each iteration."""
    torch.manual_seed(0)
    # by iterations one epoch is enough: mmengine's loop sleeps two seconds after each
    data = [dict(x=torch.full((2,), float(i))) for i in range(2 if by_epoch else 10)]
    loader = dict(dataset=data, batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False))
    loop = dict(max_epochs=until) if by_epoch else dict(max_iters=until, val_interval=1)
    return kind(
        model=Linear(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        val_dataloader={**loader, 'dataset': data[:1]},
        val_evaluator=Evaluator([Scores(scores, prefix, done)]),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        param_scheduler=dict(type='StepLR', step_size=1, by_epoch=by_epoch),
        train_cfg=dict(by_epoch=by_epoch, **loop),
        val_cfg=dict(),
        default_hooks=dict(checkpoint=hook),
        randomness=dict(seed=0),
        experiment_name='-'.join([*work_dir.parts[-3:], str(until)]),
        default_scope='mmengine',
        resume=resume,
    )


def files(root: Path) -> list[str]:
    """The checkpoints under a folder; names of published ones hold a hash of the time."""
    paths = (path for path in root.rglob('*.pth') if path.is_file())
    return sorted(re.sub(r'-\w{8}\.pth', '-HASH.pth', str(path.relative_to(root))) for path in paths)


def plain(value, root: Path):
    """A checkpoint without what differs in any two trainings: times, places, names, and hashes of these."""
    if isinstance(value, dict):
        skipped = ('cfg', 'time', 'experiment_name', 'exp_name', 'eta', 'outdated_ckpt_ids', 'log_scalars')
        return {key: plain(item, root) for key, item in value.items() if key not in skipped}
    if isinstance(value, (list, tuple)):
        return [plain(item, root) for item in value]
    if torch.is_tensor(value):
        return value.tolist()
    return value.replace(str(root), 'ROOT') if isinstance(value, str) else value


def log_lines(root: Path) -> list[str]:
    """What a training said of its checkpoints, in any order."""
    text = ''.join(path.read_text() for path in root.rglob('*.log'))
    lines = [re.sub(r'^.*(INFO|WARNING) - ', '', line) for line in text.splitlines() if 'heckpoint' in line]
    return sorted(re.sub(r'-\w{8}\.pth', '-HASH.pth', line.replace(str(root), 'ROOT')) for line in lines)


def outcome(root: Path, hook: dict, untils, by_epoch=True, later=None, **kwargs) -> dict:
    """Train, resume where there are several ends, and return all that a checkpoint hook leaves."""
    done = 0
    for number, until in enumerate(untils):
        hook = {**hook, **(later or {})} if number else hook
        run = make_runner(root / 'run', dict(hook), until, by_epoch, bool(number), done=done, **kwargs)
        run.train()
        done = until
    checkpoints = {name: read_checkpoint(root / name) for name in files(root) if 'HASH' not in name}
    last = root / 'run' / 'last_checkpoint'
    return dict(
        files=files(root),
        checkpoints=plain(checkpoints, root),
        hub=plain(run.message_hub.runtime_info, root),
        last=plain(last.read_text(), root) if last.exists() else None,
        log=[line for line in log_lines(root) if 'Hook' not in line and "'type'" not in line],
    )


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
