"""Sampling jobs: the same images for any batch size and number of processes, restart, manifest, bad input."""
import json
import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from models import VAR, VQVAE
from tests.runs import TINY_VQVAE, launch, make_tokenizer
from utils.hub import fetch, sha256_of
from utils.log import one_line_errors


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """(file of train.py, flat generator file, flat tokenizer file); random weights that draw varied codes."""
    root = tmp_path_factory.mktemp('weights')
    vae = VQVAE(**TINY_VQVAE)
    vae.load_state_dict(torch.load(make_tokenizer(root / 'vae.pth'), weights_only=True))
    var = VAR(vae, num_classes=4, patch_nums=TINY_VQVAE['v_patch_nums'], attn_l2_norm=True,
              **VAR.published_sizes(2))
    var.init_weights(init_head=2., init_adaln_gamma=0.5, init_std=0.1)
    torch.save(var.state_dict(), root / 'var.pth')
    trainer = dict(var_wo_ddp=var.state_dict(), vae_local=vae.state_dict())
    torch.save(dict(epoch=1, iter=0, trainer=trainer, args={}), root / 'ar-ckpt-last.pth')
    return root / 'ar-ckpt-last.pth', root / 'var.pth', root / 'vae.pth'


@pytest.fixture
def sample_here(monkeypatch, weights):
    handlers = logging.root.handlers[:]

    def run(folder, *flags):
        argv = ['sample.py', f'--ckpt={weights[0]}', f'--output={folder}', '--num_images=20', *flags]
        monkeypatch.setattr(sys, 'argv', argv)
        with one_line_errors('sample.py'):
            sample.main()
        return np.load(f'{folder}.npz')['arr_0']
    yield run
    logging.root.handlers[:] = handlers
    logging.captureWarnings(False)


def same_images(a, b):
    """Equal but for a rounding step here and there: kernels may sum in another order in another batch."""
    difference = np.abs(a.astype(int) - b.astype(int))
    return difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_images_do_not_depend_on_batches_or_processes(sample_here, tmp_path, weights):
    eight = sample_here(tmp_path / 'a', '--bs=8')
    assert eight.shape == (20, 16, 16, 3) and eight.dtype == np.uint8
    assert len(np.unique(eight.reshape(20, -1), axis=0)) == 20  # no two images share their noise
    assert same_images(sample_here(tmp_path / 'b', '--bs=1'), eight)
    flags = [f'--ckpt={weights[0]}', f'--output={tmp_path / "c"}', '--num_images=20', '--bs=3']
    launch('sample.py', flags, nproc=2)
    assert same_images(np.load(tmp_path / 'c.npz')['arr_0'], eight)
    assert not same_images(sample_here(tmp_path / 'd', '--seed=1'), eight)
    shorter = sample_here(tmp_path / 'e', '--num_images=10')
    assert same_images(shorter, eight[:10])


def test_restart_redraws_what_is_missing(sample_here, tmp_path):
    folder = tmp_path / 'a'
    first = sample_here(folder, '--bs=6')
    untouched = (folder / '000000.png').stat().st_mtime_ns
    for i in (7, 19):
        (folder / f'{i:06d}.png').unlink()
    assert np.array_equal(sample_here(folder, '--bs=6'), first)
    assert (folder / '000000.png').stat().st_mtime_ns == untouched


def test_manifest_and_class_balance(sample_here, tmp_path, weights):
    array = sample_here(tmp_path / 'a', '--cfg=2', '--top_k=16', '--top_p=0.9', '--classes=3_1')
    manifest = json.loads((tmp_path / 'a.json').read_text())
    assert manifest['settings']['cfg'] == 2 and manifest['settings']['top_k'] == 16
    assert manifest['class_ids'] == [3, 1] and manifest['versions']['torch'] == torch.__version__
    assert manifest['sha256'] == {weights[0].name: sha256_of(weights[0])}
    assert manifest['npz_sha256'] == sha256_of(tmp_path / 'a.npz')
    with Image.open(tmp_path / 'a' / '000005.png') as image:
        assert np.array_equal(np.asarray(image), array[5])


def test_flat_released_files_work_alike(sample_here, tmp_path, weights):
    one_file = sample_here(tmp_path / 'a')
    two_files = sample_here(tmp_path / 'b', f'--ckpt={weights[1]}', f'--vae_ckpt={weights[2]}')
    assert np.array_equal(one_file, two_files)


def test_more_smooth_and_precision_change_images_little(sample_here, tmp_path):
    plain = sample_here(tmp_path / 'a').astype(float)
    assert not np.array_equal(sample_here(tmp_path / 'b', '--more_smooth'), plain)
    half = sample_here(tmp_path / 'c', '--fp16=2').astype(float)
    same = np.abs(half - plain).reshape(20, -1).mean(1) < 4
    assert same.mean() > 0.5  # the same noise; a few codes flip under rounding


@pytest.mark.parametrize(('flags', 'words'), [
    (['--top_k=33'], ['top_k', '0..32', '33']),
    (['--classes=0_9'], ['labels in 0..4', '9']),
    (['--ckpt=nowhere.pth'], ['nowhere.pth', 'var_d16.pth']),
    (['--vae_ckpt={flat}'], ['holds no VQVAE'])])
def test_bad_input_is_one_line(sample_here, tmp_path, weights, flags, words):
    with pytest.raises(SystemExit) as stop:
        sample_here(tmp_path / 'a', *(flag.format(flat=weights[1]) for flag in flags))
    text = stop.value.code
    assert isinstance(text, str) and len(text.splitlines()) == 1 and all(word in text for word in words), text
    assert not (tmp_path / 'a.npz').exists()


def test_other_settings_need_another_folder(sample_here, tmp_path):
    sample_here(tmp_path / 'a')
    with pytest.raises(SystemExit) as stop:
        sample_here(tmp_path / 'a', '--cfg=3')
    assert 'other settings' in stop.value.code and '--output' in stop.value.code


def test_generator_and_tokenizer_must_belong_together(sample_here, tmp_path):
    other = VQVAE(**TINY_VQVAE | dict(vocab_size=64))
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    with pytest.raises(SystemExit) as stop:
        sample_here(tmp_path / 'a', f'--vae_ckpt={tmp_path / "other.pth"}')
    assert 'vocab_size=32, got 64' in stop.value.code


def test_fetch_checks_digests_and_explains_an_unreachable_hub(tmp_path, monkeypatch):
    path = tmp_path / 'file.pth'
    path.write_bytes(b'weights')
    assert fetch(str(path), sha256_of(path)) == path
    with pytest.raises(ValueError, match='SHA-256'):
        fetch(str(path), '0' * 64)
    monkeypatch.chdir(tmp_path)

    def unreachable(*_):
        raise ConnectionError('no route')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', unreachable)
    with pytest.raises(ValueError, match=r'var_d16\.pth is not in the .*FoundationVision/var.*its path'):
        fetch('var_d16.pth')
