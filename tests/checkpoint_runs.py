"""Short trainings by mmengine's Runner with a checkpoint hook, and all that such a hook leaves."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import FileClient, LocalBackend
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmdet_ce.checkpoints import read_checkpoint


class Linear(BaseModel):
    """The least that a Runner trains."""

    def __init__(self, in_features=2, out_features=1):
        super().__init__()
        self.fc = torch.nn.Linear(in_features, out_features)

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
