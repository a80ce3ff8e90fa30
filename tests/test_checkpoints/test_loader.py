"""mmengine, and with it every tool of MMDetection, loads through the gate."""

from __future__ import annotations

import functools
import http.server
import threading

import hostile
import pytest
import torch
from mmengine.runner import CheckpointLoader

from mmdet_ce.checkpoints import CheckpointFileError, load_from_local, sha256

load = CheckpointLoader.load_checkpoint


@pytest.fixture
def url(tmp_path, monkeypatch):
    """The address of a web server of files in ``tmp_path / 'www'``; torch's cache is empty."""
    (tmp_path / 'www').mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / 'www'))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_what_a_training_would_run_or_delete_is_left_out(tmp_path):
    """mmengine parses meta.config as Python, and deletes the best checkpoint when a better one comes."""
    path, marker = tmp_path / 'iter_3.pth', tmp_path / 'marker'
    meta = dict(iter=3, epoch=1, config=f"x = __import__('os').system('touch {marker}')", mmdet_version='3.3.0')
    best = {
        f'best_ckpt_{i}': str(path) for i, path in enumerate(['/another/place/best_a.pth', path, tmp_path / 'best_a'])
    }
    info = dict(best, best_ckpt=str(tmp_path / 'best_a.pth'), best_score=0.5, keep_ckpt_ids=[1, 2], last_ckpt=str(path))
    hub = dict(log_scalars={}, resumed_keys={}, runtime_info=info)
    torch.save(dict(meta=meta, state_dict={}, message_hub=hub), path)
    loaded = load(str(path))
    assert loaded['meta'] == dict(iter=3, epoch=1, mmdet_version='3.3.0')
    kept = {key: value for key, value in info.items() if key not in best}
    assert loaded['message_hub']['runtime_info'] == kept


def test_tensors_go_to_the_device_that_is_asked_for(tmp_path):
    torch.save({'state_dict': {'w': torch.zeros(2)}, 'meta': {}}, tmp_path / 'a.pth')
    assert load_from_local(str(tmp_path / 'a.pth'), 'meta')['state_dict']['w'].is_meta
    torch.save([1], tmp_path / 'a.pth')
    with pytest.raises(CheckpointFileError, match='holds a list; expected a state dict'):
        load(str(tmp_path / 'a.pth'))


def test_a_url_is_downloaded_once(url, tmp_path):
    file = tmp_path / 'www' / 'a.pth'
    torch.save({'w': torch.ones(2)}, file)
    for _ in range(2):
        assert load(f'{url}/a.pth?download=1')['w'].sum() == 2
        file.unlink(missing_ok=True)
    assert [path.name for path in (tmp_path / 'home' / 'hub' / 'checkpoints').iterdir()] == ['a.pth']


def test_a_hash_in_the_name_is_checked(url, tmp_path):
    file = tmp_path / 'www' / 'a.pth'
    torch.save({'w': torch.ones(2)}, file)
    right = file.rename(tmp_path / 'www' / f'a-{sha256(file)[:8]}.pth')
    assert load(f'{url}/{right.name}')['w'].sum() == 2
    right.rename(tmp_path / 'www' / 'a-00000000.pth')
    with pytest.raises(CheckpointFileError, match='a-00000000.pth could not be downloaded: invalid hash value'):
        load(f'{url}/a-00000000.pth')
    assert not [*(tmp_path / 'home').rglob('a-00000000*')]


def test_a_hostile_file_from_a_url_is_refused(url, tmp_path):
    marker = tmp_path / 'marker'
    (tmp_path / 'www' / 'a.pth').write_bytes(hostile.live(marker)['os.system'])
    with pytest.raises(CheckpointFileError, match='a.pth was refused, and nothing in it was run'):
        load(f'{url}/a.pth')
    assert not marker.exists()


def test_a_dead_url_is_one_line(url):
    with pytest.raises(CheckpointFileError, match=f'checkpoint {url}/none.pth could not be downloaded: File not found'):
        load(f'{url}/none.pth')
