"""The analysis tools, in process, on a tiny shapes data set: what they write, and one line for bad input."""

from __future__ import annotations

import csv
import json

import analyze_channels
import channel_summary
import compare_detections
import cv2
import pytest
import torch
from conftest import ROOT
from make_shapes_dataset import make_dataset
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.fileio import dump
from utils import call, randomize

from mmdet_ce.channel_analysis import LayerStatistics

pytestmark = pytest.mark.slow

CE = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18-ce_fpn_8e_shapes.py'
PLAIN = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18_fpn_8e_shapes.py'
SMALL = ['--cfg-options', 'model.backbone.base_channels=16', 'test_dataloader.num_workers=0']
SMALL += ['test_dataloader.persistent_workers=False']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with the data set where the configs look for it, and a checkpoint of each."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'data').mkdir()
    make_dataset(folder / 'data' / 'shapes', train=1, val=3)
    for name, config in (('plain', PLAIN), ('ce', CE)):
        backbone = randomize(MODELS.build({**Config.fromfile(config).model.backbone, 'base_channels': 16}))
        state_dict = {f'backbone.{key}': t for key, t in backbone.state_dict().items()}
        torch.save(dict(state_dict={**state_dict, 'neck.weight': torch.ones(1)}), folder / f'{name}.pth')
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_plain_against_ce(folder, capsys):
    models = ['--model', 'without', PLAIN, 'plain.pth', '--model', 'with', CE, 'ce.pth']
    assert call(analyze_channels.main, *models, '--num-images', 2, '--out-dir', 'both', *SMALL) is None
    printed = capsys.readouterr().out
    assert 'without: 2 images' in printed and 'inhibited channels, where CE sits: without' in printed

    table = csv.DictReader((folder / 'both' / 'channels.csv').read_text().splitlines())
    rows = {(row['model'], row['layer']): row for row in table}
    assert len(rows) == 2 * (17 + 4)
    assert rows['with', 'bn1']['lambda'] and not rows['without', 'bn1']['lambda']
    record = json.loads((folder / 'both' / 'channels.json').read_text())
    layers = {(row['model'], row['layer']): row for row in record['layers']}
    row = layers['with', 'layer3.1.bn2']
    contribution = torch.tensor(row['contribution'])
    assert len(contribution) == len(row['gamma']) == 64
    low = (contribution <= 0.05 * contribution.mean()).double().mean().item()
    assert row['inhibited_relative'] == low == float(rows['with', 'layer3.1.bn2']['inhibited_relative'])
    groups = [(row['model'], row['group'], row['layers']) for row in record['summary']]
    assert groups[:3] == [('without', 'ce', 7), ('with', 'before', 7), ('with', 'ce', 7)]
    assert {group[1:] for group in groups[3:]} == {('other', 10), ('output', 4)}
    picture = cv2.imread(str(folder / 'both' / 'channels.png'))
    assert picture.shape[0] > 900 and picture.std() > 10


def test_plain_alone(folder):
    """A figure without the panels of CE."""
    assert call(analyze_channels.main, '--model', 'x', PLAIN, 'plain.pth', '--out-dir', 'one', *SMALL) is None
    record = json.loads((folder / 'one' / 'channels.json').read_text())
    assert [row['group'] for row in record['summary']] == ['other', 'output']
    assert cv2.imread(str(folder / 'one' / 'channels.png')).shape[0] < 900


def test_low_gamma_contribution():
    """By hand: the two channels of the smallest gammas, of eight, contribute 2 and 0 where the mean is 1."""
    gamma = torch.tensor([0.1, 1, 1, 1, 0.2, 1, 1, 1.0])
    contribution = torch.tensor([2, 1, 1, 1, 0, 1, 1, 1.0])
    assert channel_summary.low_gamma_contribution([LayerStatistics(contribution, gamma)]) == 1
    assert channel_summary.low_gamma_contribution([LayerStatistics(contribution * 5, 1 / gamma)]) == 1
    contribution[4] = 2
    assert channel_summary.low_gamma_contribution([LayerStatistics(contribution, gamma)]) == pytest.approx(1.6)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--model', 'a', 'none.py', 'ce.pth'], 'error: config none.py of a not found'),
        (['--model', 'a', CE, 'none.pth'], 'error: checkpoint none.pth not found'),
        (['--model', 'a', PLAIN, 'ce.pth'], 'error: ce.pth holds another backbone than'),
        (['--model', 'a', CE, 'plain.pth'], 'error: plain.pth holds another backbone than'),
        (['--model', 'a', CE, 'ce.pth', '--model', 'a', CE, 'ce.pth'], 'error: each --model needs a name of its own'),
        (['--model', 'a', CE, 'ce.pth', '--num-images', '0'], 'error: --num-images must be at least 1, got 0'),
    ],
)
def test_analyze_channels_refuses(arguments, message, folder):
    error = call(analyze_channels.main, *arguments, '--out-dir', 'refused', *SMALL)
    assert error.startswith(message) and '\n' not in error
    assert not (folder / 'refused').exists()


@pytest.fixture(scope='module')
def predictions(folder):
    """The ground truth as a test would dump it, found with certainty, and its data set."""
    dataset_cfg = Config.fromfile(CE).test_dataloader.dataset
    dataset_cfg.data_root = str(folder / dataset_cfg.data_root)
    dataset = DATASETS.build(dataset_cfg)
    found = []
    for item in dataset:
        sample = item['data_samples']
        truth = sample.gt_instances
        instances = dict(bboxes=truth.bboxes.tensor, labels=truth.labels, scores=torch.ones(len(truth)))
        encoded = compare_detections.coco_mask.encode(truth.masks.masks.transpose(1, 2, 0).copy(order='F'))
        found.append(dict(img_id=sample.img_id, pred_instances={**instances, 'masks': encoded}))
    dump(found, folder / 'found.pkl')
    dump([{**one, 'pred_instances': {k: v[:0] for k, v in one['pred_instances'].items()}} for one in found],
         folder / 'nothing.pkl')  # fmt: skip
    return found, dataset


def test_detections_beside_ground_truth(folder, predictions):
    """Right detections look like the ground truth but for the scores, none like the image alone."""
    arguments = [CE, '--predictions', 'all', 'found.pkl', '--predictions', 'none', 'nothing.pkl', '--num-images', 2]
    assert call(compare_detections.main, *arguments, '--out', 'pictures/both.png') is None
    picture = cv2.imread(str(folder / 'pictures' / 'both.png')).astype(float)
    truth, found, nothing = (picture[40:, 275 * i : 275 * (i + 1)] for i in range(3))
    # mmdet varies the colours of masks at random, so what is compared is where something was drawn
    truth, found = (abs(drawn - nothing).max(axis=2) > 20 for drawn in (truth, found))
    assert (truth & found).sum() > 0.7 * (truth | found).sum() > 1000


def test_detections_are_resized(predictions):
    found, dataset = predictions
    sample = dataset[0]['data_samples']
    sample.set_metainfo(dict(img_shape=(256, 256), scale_factor=(2.0, 2.0)))
    instances = compare_detections.resized(found[0]['pred_instances'], sample)
    assert torch.equal(instances.bboxes, 2 * sample.gt_instances.bboxes.tensor)
    masks = torch.from_numpy(sample.gt_instances.masks.masks).bool()
    assert torch.equal(instances.masks, masks.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_compare_detections_refuses(folder, predictions):
    found, _ = predictions
    dump(found[1:], folder / 'others.pkl')
    dump(dict(bbox_mAP=0.3), folder / 'metrics.pkl')
    (folder / 'text.pkl').write_text('text')
    for config, file, message in (
        ('none.py', 'found.pkl', 'error: config none.py not found'),
        (CE, 'none.pkl', 'error: predictions none.pkl not found'),
        (CE, 'others.pkl', 'error: others.pkl lacks image 1 of the test data set'),
        (CE, 'metrics.pkl', 'error: metrics.pkl holds no predictions'),
        (CE, 'text.pkl', 'error: text.pkl holds no predictions'),
    ):
        error = call(compare_detections.main, config, '--predictions', 'x', file, '--out', 'refused.png')
        assert error.startswith(message) and '\n' not in error
        assert not (folder / 'refused.png').exists()
