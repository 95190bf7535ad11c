"""Sampling jobs: the same images for any batch size and number of processes, restart, manifest, bad input."""
import csv
import json
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from configs import parse_sampling
from evaluation.pictures import save_contact_sheet
from evaluation.score import ScoreSettings, score_images
from models import VAR, VQVAE
from tests.runs import TINY_VQVAE, kept_logging, kill_tree, launch, make_tokenizer, same_images, start
from tests.test_contract import GENERATORS
from utils.hub import fetch, sha256_of
from utils.image_sets import open_images, shuffled
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


def by_index(npz):
    """Images of an npz in the order they were drawn in."""
    array = np.load(npz)['arr_0']
    images = np.empty_like(array)
    images[shuffled(len(array), 0)] = array
    return images


@pytest.fixture
def sample_here(monkeypatch, weights):
    def run(folder, *flags):
        argv = ['sample.py', f'--ckpt={weights[0]}', f'--output={folder}', '--num_images=20', *flags]
        monkeypatch.setattr(sys, 'argv', argv)
        sample.load_generator.cache_clear()
        with one_line_errors('sample.py'):
            sample.main()
        return by_index(f'{folder}.npz')
    with kept_logging():
        yield run


def test_images_do_not_depend_on_batches_or_processes(sample_here, tmp_path, weights):
    eight = sample_here(tmp_path / 'a', '--bs=8')
    assert eight.shape == (20, 16, 16, 3) and eight.dtype == np.uint8
    assert len(np.unique(eight.reshape(20, -1), axis=0)) == 20  # no two images share their noise
    assert same_images(sample_here(tmp_path / 'b', '--bs=1'), eight)
    flags = [f'--ckpt={weights[0]}', f'--output={tmp_path / "c"}', '--num_images=20', '--bs=8']
    launch('sample.py', flags, nproc=2)
    assert (tmp_path / 'c.npz').read_bytes() == (tmp_path / 'a.npz').read_bytes()
    manifest = json.loads((tmp_path / 'c.json').read_text())
    assert manifest['weights_sha256'] == dict(ckpt=sha256_of(weights[0]))
    assert same_images(sample_here(tmp_path / 'f', '--bs=3'), eight)
    assert not same_images(sample_here(tmp_path / 'd', '--seed=1'), eight)
    shorter = sample_here(tmp_path / 'e', '--num_images=10')
    assert same_images(shorter, eight[:10])


def test_restart_redraws_what_is_missing(sample_here, tmp_path):
    folder = tmp_path / 'a'
    first = sample_here(folder, '--bs=6')
    bytes_before = (tmp_path / 'a.npz').read_bytes()
    untouched = (folder / '000000.png').stat().st_mtime_ns
    for i in (7, 19):
        (folder / f'{i:06d}.png').unlink()
    assert np.array_equal(sample_here(folder, '--bs=6'), first)
    assert (folder / '000000.png').stat().st_mtime_ns == untouched
    assert (tmp_path / 'a.npz').read_bytes() == bytes_before


@pytest.mark.parametrize('form', ['png', 'npz'])
def test_complete_jobs_are_left_alone(sample_here, tmp_path, monkeypatch, form):
    first = sample_here(tmp_path / 'a', f'--format={form}')
    monkeypatch.setattr(sample, 'sample_batch', None)  # nothing may be drawn
    assert np.array_equal(sample_here(tmp_path / 'a', f'--format={form}', '--bs=3', '--writers=1'), first)
    (tmp_path / 'a.npz').unlink()
    if form == 'png':  # packs what is there
        assert np.array_equal(sample_here(tmp_path / 'a'), first)
    else:
        with pytest.raises(TypeError):
            sample_here(tmp_path / 'a', '--format=npz')


# ---------------------------------------------------------------------------------------------- pictures
@pytest.fixture(scope='module')
def named(weights):
    """The checkpoint of `weights` with names of its classes, of which two begin alike."""
    path = weights[0].with_name('named.pth')
    content = torch.load(weights[0], weights_only=True) | dict(classes=['red', 'red_cat', 'dog', '7'])
    torch.save(content, path)
    return path


def test_classes_by_name(sample_here, tmp_path, named):
    by_id = sample_here(tmp_path / 'a', f'--ckpt={named}', '--classes=1_2_0')
    by_name = sample_here(tmp_path / 'b', f'--ckpt={named}', '--classes=red_cat_dog_red')
    assert np.array_equal(by_id, by_name)
    for text in ('red_cow', 'Dog'):
        with pytest.raises(SystemExit, match='the checkpoint knows red, red_cat, dog, 7'):
            sample_here(tmp_path / 'c', f'--ckpt={named}', f'--classes={text}')


def test_names_need_a_checkpoint_that_has_them(sample_here, tmp_path):
    with pytest.raises(SystemExit, match='the checkpoint holds none: pass class ids'):
        sample_here(tmp_path / 'a', '--classes=dog')


@pytest.mark.parametrize('form', ['png', 'npz'])
def test_a_contact_sheet_shows_the_first_images_of_each_class(sample_here, tmp_path, form):
    images = sample_here(tmp_path / 'a', '--classes=3_1', f'--format={form}')
    sheet = np.asarray(Image.open(tmp_path / 'a.png'))
    assert sheet.shape == (2 * 16 + 2, 10 * 16 + 9 * 2, 3)
    for row, first in enumerate((1, 0)):  # class 1 above class 3
        for column in range(10):
            tile = sheet[18 * row:18 * row + 16, 18 * column:18 * column + 16]
            assert np.array_equal(tile, images[first + 2 * column])
    sample_here(tmp_path / 'b', '--sheet=0')
    assert not (tmp_path / 'b.png').exists()


def test_a_contact_sheet_is_never_large(tmp_path):
    rows = [[np.full((256, 512, 3), 10 * row, np.uint8)] * 16 for row in range(16)]
    save_contact_sheet(tmp_path / 'a.png', rows)
    sheet = Image.open(tmp_path / 'a.png')
    assert max(sheet.size) <= 2048 + 16 * 2
    assert sheet.getpixel((5, sheet.height - 5)) == (150, 150, 150)


def test_overwriting_replaces_a_job_and_nothing_else(sample_here, tmp_path):
    folder = tmp_path / 'a'
    sample_here(folder, '--seed=1')
    (folder / 'notes.png').write_bytes(b'mine')
    with pytest.raises(SystemExit, match='other settings'):
        sample_here(folder, '--seed=2')
    fewer = sample_here(folder, '--seed=2', '--overwrite', '--num_images=8')
    assert {path.name for path in folder.glob('*.png')} == {'notes.png', *(f'{i:06d}.png' for i in range(8))}
    assert np.array_equal(fewer, sample_here(tmp_path / 'b', '--seed=2', '--num_images=8'))

    # The same job again removes nothing; images of unknown settings are refused as ever.
    before = (folder / '000000.png').stat().st_mtime_ns
    sample_here(folder, '--seed=2', '--overwrite')
    assert (folder / '000000.png').stat().st_mtime_ns == before
    (folder / 'settings.json').unlink()
    with pytest.raises(SystemExit, match='unknown settings'):
        sample_here(folder, '--seed=3', '--overwrite')


def test_npz_without_png_files_is_the_same_file(sample_here, tmp_path):
    sample_here(tmp_path / 'a', '--bs=6')
    sample_here(tmp_path / 'b', '--bs=6', '--format=npz')
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    left = {path.name for path in (tmp_path / 'b').iterdir()}
    assert left == {'settings.json', 'labels.npy', '.lock'}


def test_pieces_of_a_stopped_job_are_kept(sample_here, tmp_path, monkeypatch):
    """The job stops at its third batch and goes on with other batches: what was drawn is not drawn again."""
    draw, drawn = sample.sample_batch, []

    def stop_at_twelve(model, config, index_B, label_B):
        if index_B.start == 12:
            raise OSError('no space left')
        return draw(model, config, index_B, label_B)
    monkeypatch.setattr(sample, 'sample_batch', stop_at_twelve)
    with pytest.raises(SystemExit, match='no space left'):
        sample_here(tmp_path / 'a', '--bs=6', '--format=npz')
    assert not (tmp_path / 'a.npz').exists()
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / 'a').glob('pixels-*.npy')}
    assert {path.name for path in pieces} == {'pixels-000000-000006.npy', 'pixels-000006-000012.npy'}

    def record(model, config, index_B, label_B):
        drawn.append(index_B)
        assert all(path.stat().st_mtime_ns == time for path, time in pieces.items())
        return draw(model, config, index_B, label_B)
    monkeypatch.setattr(sample, 'sample_batch', record)
    resumed = sample_here(tmp_path / 'a', '--bs=5', '--format=npz')
    assert drawn == [range(10, 15), range(15, 20)]
    monkeypatch.setattr(sample, 'sample_batch', draw)
    assert same_images(resumed, sample_here(tmp_path / 'b'))


@pytest.mark.slow
@pytest.mark.parametrize('form', ['png', 'npz'])
def test_killed_job_ends_in_the_same_bytes(sample_here, tmp_path, weights, form):
    flags = [f'--ckpt={weights[0]}', '--num_images=400', '--bs=4', f'--format={form}']
    sample_here(tmp_path / 'whole', *flags)
    folder, pattern = tmp_path / 'killed', '*.png' if form == 'png' else 'pixels-*.npy'
    process = start('sample.py', [*flags, f'--output={folder}'])
    while len(list(folder.glob(pattern))) < 5:
        assert process.poll() is None, 'the job ended before it was killed'
        time.sleep(0.005)
    kill_tree(process.pid)
    process.wait()
    assert not (tmp_path / 'killed.npz').exists()
    sample_here(folder, *flags)
    assert (tmp_path / 'killed.npz').read_bytes() == (tmp_path / 'whole.npz').read_bytes()


def test_manifest_names_all_that_repeats_the_file(sample_here, tmp_path, weights):
    images = sample_here(tmp_path / 'a', '--cfg=2', '--top_k=16', '--top_p=0.9', '--classes=3_1', '--seed=5')
    manifest = json.loads((tmp_path / 'a.json').read_text())
    settings = manifest['settings']
    assert settings['cfg'] == 2 and settings['top_k'] == 16 and settings['seed'] == 5
    assert manifest['versions']['torch'] == torch.__version__ and manifest['batch_size'] == 64
    assert manifest['weights_sha256'] == dict(ckpt=sha256_of(weights[0]))
    assert manifest['ckpt'] == str(weights[0])
    assert manifest['npz_sha256'] == sha256_of(tmp_path / 'a.npz')
    assert manifest['folder_sha256'] == open_images(tmp_path / 'a').sha256()
    assert len(manifest['git_commit'].removesuffix('+changes')) == 40
    with Image.open(tmp_path / 'a' / '000005.png') as image:
        assert np.array_equal(np.asarray(image), images[5])
    assert manifest['weights'] == 'raw'  # there is no average in the file
    assert 'classes' not in manifest  # this file does not name them
    flags = [f'--{name}={value}' for name, value in settings.items() if value not in ('', None)]
    again = sample_here(tmp_path / 'b', *flags, f'--num_images={manifest["num_images"]}')
    assert np.array_equal(again, images)
    assert (tmp_path / 'b.npz').read_bytes() == (tmp_path / 'a.npz').read_bytes()

    # An image of somebody else neither ends the job, nor gets into the manifest.
    Image.new('RGB', (8, 4)).save(tmp_path / 'b' / 'mine.png')
    (tmp_path / 'b.npz').unlink()
    sample_here(tmp_path / 'b', *flags, f'--num_images={manifest["num_images"]}')
    assert 'folder_sha256' not in json.loads((tmp_path / 'b.json').read_text())


def test_manifest_is_of_the_file_that_was_loaded(sample_here, tmp_path, weights, monkeypatch):
    """A training replaces the checkpoint when it has just been loaded."""
    path, build = tmp_path / 'ckpt.pth', sample.build
    shutil.copy(weights[0], path)

    def replace_and_build(*args):
        shutil.copy(weights[1], tmp_path / 'new.pth').rename(path)
        return build(*args)
    monkeypatch.setattr(sample, 'build', replace_and_build)
    sample_here(tmp_path / 'a', f'--ckpt={path}', '--num_images=2')
    manifest = json.loads((tmp_path / 'a.json').read_text())
    assert manifest['weights_sha256'] == dict(ckpt=sha256_of(weights[0]))


def test_manifest_names_the_classes_that_were_drawn(sample_here, tmp_path, weights):
    checkpoint = torch.load(weights[0], weights_only=True)
    for name, classes, drawn in (('a', ['ant', 'bee', 'cow', 'd\u00f6e'], {'3': 'd\u00f6e', '1': 'bee'}),
                                 ('b', ['ant', 'bee'], None), ('c', 4, None)):
        torch.save(checkpoint | dict(classes=classes), tmp_path / f'{name}.pth')
        sample_here(tmp_path / name, f'--ckpt={tmp_path / name}.pth', '--classes=3_1_4', '--num_images=3')
        assert json.loads((tmp_path / f'{name}.json').read_text()).get('classes') == drawn
        assert 'classes' not in json.loads((tmp_path / name / 'settings.json').read_text())


def test_classes_are_balanced_and_mixed(sample_here, tmp_path):
    sample_here(tmp_path / 'a', '--classes=3_1')
    with np.load(tmp_path / 'a.npz') as archive:
        assert archive.files == ['arr_0', 'arr_1']
        images, labels = archive['arr_0'], archive['arr_1']
    assert images.shape == (20, 16, 16, 3) and images.dtype == np.uint8
    assert np.bincount(labels, minlength=4).tolist() == [0, 10, 0, 10] and labels.dtype == np.int64
    assert np.array_equal(labels, np.array([3, 1])[shuffled(20, 0) % 2])  # each with its image
    assert not np.array_equal(labels, np.array([3, 1] * 10))
    sample_here(tmp_path / 'b', '--classes=3_1', '--shuffle=-1')
    unshuffled = np.load(tmp_path / 'b.npz')
    assert unshuffled['arr_1'].tolist() == [3, 1] * 10
    assert np.array_equal(unshuffled['arr_0'][shuffled(20, 0)], images)


@pytest.mark.parametrize('suffix', ['npy', 'txt'])
def test_listed_labels(sample_here, tmp_path, suffix):
    wanted, path = [0, 0, 3, 2, 4], tmp_path / f'labels.{suffix}'  # 4: no class
    np.save(path, wanted) if suffix == 'npy' else path.write_text('\n'.join(map(str, wanted)))
    listed = sample_here(tmp_path / 'a', f'--labels={path}', '--num_images=5')
    assert np.load(tmp_path / 'a.npz')['arr_1'].tolist() == [wanted[i] for i in shuffled(5, 0)]
    assert np.array_equal(listed[3], sample_here(tmp_path / 'b', '--classes=2', '--num_images=5')[3])
    path.unlink()
    np.save(path, [0, 0, 3, 2, 1]) if suffix == 'npy' else path.write_text('0 0 3 2 1')
    with pytest.raises(SystemExit, match='other settings'):
        sample_here(tmp_path / 'a', f'--labels={path}', '--num_images=5')
    with pytest.raises(SystemExit, match=r'expected 20 integers .*number of images'):
        sample_here(tmp_path / 'c', f'--labels={path}')


def test_averaged_weights_are_taken_where_there_are_any(sample_here, tmp_path, weights):
    checkpoint = torch.load(weights[0], weights_only=True)
    raw = sample_here(tmp_path / 'a')
    trained = checkpoint['trainer']['var_wo_ddp']
    checkpoint['trainer']['var_ema'] = trained
    checkpoint['trainer']['var_wo_ddp'] = {key: value + 0.1 if value.is_floating_point() else value
                                           for key, value in trained.items()}
    torch.save(checkpoint, tmp_path / 'ckpt.pth')
    assert np.array_equal(sample_here(tmp_path / 'b', f'--ckpt={tmp_path / "ckpt.pth"}'), raw)
    assert not np.array_equal(sample_here(tmp_path / 'c', f'--ckpt={tmp_path / "ckpt.pth"}', '--weights=raw'),
                              raw)


def test_presets_hold_the_published_settings():
    readme = parse_sampling(['--preset=var_d30'])
    assert (readme.cfg, readme.top_k, readme.top_p, readme.num_images) == (1.5, 900, 0.96, 50_000)
    assert readme.ckpt == 'var_d30.pth' and 'README' in readme.source
    paper = parse_sampling(['--preset=var_d16_paper'])
    assert (paper.cfg, paper.top_k, paper.top_p) == (2., 600, 0.) and '2404.02905' in paper.source
    assert parse_sampling(['--preset=no_cfg', '--ckpt=a.pth']).sample_kwargs()['guidance'] == 1


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
    (['--classes=0_9'], ['classes 0..3', '9', '--classes']),
    (['--labels=nowhere.txt'], ['nowhere.txt', 'one per line']),
    (['--ckpt=var_d17.pth'], ['var_d17.pth', 'var_d16.pth']),
    (['--vae_ckpt={flat}'], ['holds no VQVAE'])])
def test_bad_input_is_one_line(sample_here, tmp_path, weights, flags, words):
    with pytest.raises(SystemExit) as stop:
        sample_here(tmp_path / 'a', *(flag.format(flat=weights[1]) for flag in flags))
    text = stop.value.code
    assert isinstance(text, str) and len(text.splitlines()) == 1 and all(word in text for word in words), text
    assert not (tmp_path / 'a.npz').exists()


def test_other_settings_need_another_folder(sample_here, tmp_path, weights):
    first = sample_here(tmp_path / 'a')
    moved = shutil.copy(weights[0], tmp_path / 'moved.pth')  # the same weights are the same settings
    assert np.array_equal(sample_here(tmp_path / 'a', f'--ckpt={moved}'), first)
    with pytest.raises(SystemExit) as stop:
        sample_here(tmp_path / 'a', '--cfg=3')
    assert 'other settings' in stop.value.code and '--output' in stop.value.code


def test_generator_and_tokenizer_must_belong_together(sample_here, tmp_path):
    other = VQVAE(**TINY_VQVAE | dict(vocab_size=64))
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    with pytest.raises(SystemExit) as stop:
        sample_here(tmp_path / 'a', f'--vae_ckpt={tmp_path / "other.pth"}')
    assert 'vocab_size=32, got 64' in stop.value.code


def test_the_codes_must_be_those_of_the_training(sample_here, tmp_path, weights):
    """A tokenizer beside a checkpoint of train.py may have another decoder, but no other codebook."""
    first = sample_here(tmp_path / 'a')
    assert np.array_equal(sample_here(tmp_path / 'b', f'--vae_ckpt={weights[2]}'), first)
    state = torch.load(weights[2], weights_only=True)
    state['decoder.conv_out.bias'] += 0.3
    torch.save(state, tmp_path / 'decoder.pth')
    assert not same_images(sample_here(tmp_path / 'c', f'--vae_ckpt={tmp_path / "decoder.pth"}'), first)
    state['quantize.embedding.weight'] += 0.3
    torch.save(state, tmp_path / 'codes.pth')
    with pytest.raises(SystemExit) as stop:
        sample_here(tmp_path / 'd', f'--vae_ckpt={tmp_path / "codes.pth"}')
    words = ['another tokenizer', 'codes.pth', 'quantize.embedding.weight differs', '--vae_ckpt=']
    assert len(stop.value.code.splitlines()) == 1 and all(word in stop.value.code for word in words)


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
    with pytest.raises(ValueError, match=r"'var_d16\.pth' is not in the .*FoundationVision/var.*its path"):
        fetch('var_d16.pth')
    with pytest.raises(ValueError, match=r"'FlexVARd24-epo349\.pth' is not in the .*jiaosiyu1999/FlexVAR"):
        fetch(parse_sampling(['--model=flexvar', '--preset=flexvar_d24']).ckpt)
    with pytest.raises(ValueError, match=r"no file 'pretrained/FlexVAE\.pth'.* such as FlexVAE\.pth"):
        fetch('pretrained/FlexVAE.pth')


def test_images_of_unknown_origin_are_not_packed(sample_here, tmp_path):
    (tmp_path / 'a').mkdir()
    Image.new('RGB', (16, 16), 'red').save(tmp_path / 'a' / '000003.png')
    with pytest.raises(SystemExit, match='--output'):
        sample_here(tmp_path / 'a')
    for content in ('{"half', '[1, 2]', '[' * 100_000):
        (tmp_path / 'a' / 'settings.json').write_text(content)
        with pytest.raises(SystemExit, match=r'unknown settings \(cannot read settings.json: .*--output'):
            sample_here(tmp_path / 'a')


def test_images_that_are_not_finite_are_refused(sample_here, tmp_path, weights):
    checkpoint = torch.load(weights[0], weights_only=True)
    checkpoint['trainer']['vae_local']['post_quant_conv.bias'][0] = torch.nan
    torch.save(checkpoint, tmp_path / 'ckpt.pth')
    with pytest.raises(SystemExit, match=r'image 0 has nan .*--fp16'):
        sample_here(tmp_path / 'a', f'--ckpt={tmp_path / "ckpt.pth"}')
    assert not list((tmp_path / 'a').glob('*.png'))


@pytest.mark.parametrize('name', ['head.weight', 'word_embed.weight', 'blocks.0.ffn.fc1.weight'])
def test_damaged_generators_are_noticed(sample_here, tmp_path, weights, name):
    """From nan logits codes are drawn as from others."""
    checkpoint = torch.load(weights[0], weights_only=True)
    checkpoint['trainer']['var_wo_ddp'][name].flatten()[0] = torch.nan
    torch.save(checkpoint, tmp_path / 'ckpt.pth')
    with pytest.raises(SystemExit, match='finite pixels'):
        sample_here(tmp_path / 'a', f'--ckpt={tmp_path / "ckpt.pth"}')


def test_damaged_npz_is_packed_again(sample_here, tmp_path):
    first = sample_here(tmp_path / 'a')
    content = bytearray((tmp_path / 'a.npz').read_bytes())
    content[2000] ^= 1
    (tmp_path / 'a.npz').write_bytes(content)
    assert np.array_equal(sample_here(tmp_path / 'a'), first)
    (tmp_path / 'a.json').write_text('[1, 2]')  # a manifest of nobody
    assert np.array_equal(sample_here(tmp_path / 'a'), first)
    assert json.loads((tmp_path / 'a.json').read_text())['npz_sha256'] == sha256_of(tmp_path / 'a.npz')


def test_refused_settings_leave_the_folder_free(sample_here, tmp_path):
    with pytest.raises(SystemExit, match='top_k'):
        sample_here(tmp_path / 'a', '--top_k=900')
    sample_here(tmp_path / 'a', '--top_k=9')


@pytest.mark.parametrize('damage', ['empty', 'short', 'rows'])
def test_damaged_pieces_are_named(sample_here, tmp_path, monkeypatch, damage):
    with monkeypatch.context() as patch:
        patch.setattr(sample, 'pack', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample_here(tmp_path / 'a', '--format=npz', '--bs=10')
    piece = tmp_path / 'a' / 'pixels-000000-000010.npy'
    (tmp_path / 'a' / 'pixels-x.npy').write_text('somebody else')
    if damage == 'rows':
        np.save(piece, np.load(piece)[:4])
    else:
        piece.write_bytes(piece.read_bytes()[:200 if damage == 'short' else 0])
    with pytest.raises(SystemExit, match=r'pixels-000000-000010\.npy. .*remove the file'):
        sample_here(tmp_path / 'a', '--format=npz', '--bs=10')
    piece.unlink()
    sample_here(tmp_path / 'a', '--format=npz', '--bs=10')


def test_pieces_that_a_kill_left_are_removed(sample_here, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sample.STORES['npz'], 'discard', lambda self: None)
        sample_here(tmp_path / 'a', '--format=npz')
    assert list((tmp_path / 'a').glob('pixels-*.npy'))
    sample_here(tmp_path / 'a', '--format=npz')
    assert not list((tmp_path / 'a').glob('pixels-*.npy'))


@pytest.mark.parametrize('form', ['png', 'npz'])
def test_slow_disks_do_not_fill_the_memory(tmp_path, form):
    gate, images = threading.Event(), np.zeros((128, 8, 8, 3), np.uint8)

    class Slow(sample.STORES[form]):
        def _write(self, *args):
            gate.wait()
            super()._write(*args)
    accepted = []

    def put():
        with Slow(tmp_path) as store:
            for first in range(0, 1280, 128):
                store.put(np.arange(first, first + 128), images)
                accepted.append(first)
    writer = threading.Thread(target=put)
    writer.start()
    time.sleep(0.3)
    waiting = 128 * len(accepted)
    gate.set()
    writer.join()
    assert waiting <= 640 and len(accepted) == 10
    assert Slow(tmp_path).stored(1281).tolist() == [True] * 1280 + [False]


# ---------------------------------------------------------------------------------------------- fixed batches
FAMILIES = ('var', 'flexvar', 'npp', 'flowar')


@pytest.fixture(scope='module')
def generators(tmp_path_factory):
    """Files of tiny generators with random weights, by family."""
    files = {}
    for name in FAMILIES:
        torch.manual_seed(0)
        model = GENERATORS[name].make()
        trainer = dict(var_wo_ddp=model.state_dict(), config=model.config_state(1.),
                       vae_local=model.tokenizer.state_dict(), vae_config=model.tokenizer.config_state(1.))
        files[name] = tmp_path_factory.mktemp('generators') / f'{name}.pth'
        torch.save(dict(epoch=1, iter=0, trainer=trainer, args={}), files[name])
    return files


@pytest.fixture
def fixed_job(generators, tmp_path):
    """Command line of a job that draws in batches of four."""
    def flags(model, name, *more):
        few_steps = ['--num_step=4'] if model == 'flowar' else []
        return [f'--model={model}', f'--ckpt={generators[model]}', f'--output={tmp_path / name}', '--cfg=3',
                '--fixed_bs=4', *few_steps, *more]
    return flags


def bytes_of(folder, name):
    return (folder / f'{name}.npz').read_bytes()


@pytest.mark.parametrize('model', FAMILIES)
def test_fixed_batches_draw_the_same_bytes(here, fixed_job, tmp_path, model):
    """For any --bs, for two processes, and after a kill that has left a batch and a half."""
    here(sample, *fixed_job(model, 'a', '--num_images=10', '--bs=1'))
    here(sample, *fixed_job(model, 'b', '--num_images=10', '--bs=3'))
    assert bytes_of(tmp_path, 'b') == bytes_of(tmp_path, 'a')
    for path in (*(tmp_path / 'b').glob('00000[6-9].png'), tmp_path / 'b.npz'):
        path.unlink()
    rest = fixed_job(model, 'b', '--num_images=10', '--bs=8')
    if model == 'var':
        launch('sample.py', rest, nproc=2)
    else:
        here(sample, *rest)
    assert bytes_of(tmp_path, 'b') == bytes_of(tmp_path, 'a')


@pytest.mark.slow
@pytest.mark.parametrize('model', FAMILIES)
def test_fixed_batches_draw_the_same_200_images(here, fixed_job, tmp_path, model):
    here(sample, *fixed_job(model, 'expected', '--num_images=200', '--bs=1'))
    for bs in ('7', '64'):
        flags = ['--num_images=200', f'--bs={bs}']
        here(sample, *fixed_job(model, bs, *flags))
        launch('sample.py', fixed_job(model, f'{bs} by two', *flags), nproc=2)

    killed = tmp_path / 'killed'
    process = start('sample.py', fixed_job(model, 'killed', '--num_images=200', '--bs=7'))
    while len(list(killed.glob('*.png'))) < 50:
        assert process.poll() is None, 'the job ended before it was killed'
        time.sleep(0.005)
    kill_tree(process.pid)
    process.wait()
    assert len(list(killed.glob('*.png'))) < 200
    here(sample, *fixed_job(model, 'killed', '--num_images=200', '--bs=64'))
    for name in ('7', '64', '7 by two', '64 by two', 'killed'):
        assert bytes_of(tmp_path, name) == bytes_of(tmp_path, 'expected'), name


def test_fixed_batches_belong_to_the_settings(sample_here, tmp_path):
    ten = sample_here(tmp_path / 'a', '--fixed_bs=4', '--num_images=10')
    assert len(list((tmp_path / 'a').glob('*.png'))) == 10  # what fills up the last batch is not kept
    manifest = json.loads((tmp_path / 'a.json').read_text())
    assert manifest['settings']['fixed_batch'] == manifest['batch_size'] == 4
    assert manifest['OMP_NUM_THREADS'] == 1
    for flags in (['--fixed_bs=8'], []):
        with pytest.raises(SystemExit, match=r'other settings .*fixed_batch; see settings\.json there'):
            sample_here(tmp_path / 'a', '--num_images=10', *flags)
    assert np.array_equal(sample_here(tmp_path / 'b', '--fixed_bs=4', '--num_images=6'), ten[:6])


def test_a_batch_that_is_not_used_is_named(sample_here, tmp_path, capsys):
    """Presets for scores have a fixed batch, so that another --bs saves no memory."""
    sample_here(tmp_path / 'a', '--preset=fid', '--bs=8', '--top_k=9', '--num_images=2')
    assert '--bs=8 is not used, since --fixed_bs=64' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- sweeps
def read_table(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_sweep_scores_every_combination_and_resumes(sample_here, tmp_path, monkeypatch):
    reference = np.random.RandomState(0).randint(0, 256, (30, 16, 16, 3), np.uint8)
    np.savez(tmp_path / 'ref.npz', arr_0=reference)
    flags = [f'--ref={tmp_path / "ref.npz"}', '--score=--features=digits --cache=', '--format=npz']
    folder, real = tmp_path / 'sweep', sample.score_images
    done = []

    def stop_at_the_third(settings, network):
        done.append(settings.sample)
        if len(done) == 3:
            raise OSError('stopped')
        return real(settings, network)
    monkeypatch.setattr(sample, 'score_images', stop_at_the_third)
    with pytest.raises(SystemExit, match='stopped'):
        sample_here(folder, '--sweep=cfg=1,2 top_k=0,8', *flags)
    assert len(read_table(tmp_path / 'sweep.csv')) == 2
    with pytest.raises(FileNotFoundError):  # a sweep packs no npz of its own
        sample_here(folder, '--sweep=cfg=1,2 top_k=0,8', *flags)
    rows = read_table(tmp_path / 'sweep.csv')
    assert [(row['cfg'], row['top_k']) for row in rows] == [('1.0', '0'), ('1.0', '8'), ('2.0', '0'),
                                                           ('2.0', '8')]
    assert len(done) == 5 and len({row['fid'] for row in rows}) == 4  # two scored once, the third again
    assert Image.open(tmp_path / 'sweep.png').size[0] > 100
    for other in (['--sweep=cfg=1,2'], ['--sweep=cfg=1,2 top_k=0,8', '--seed=1']):  # other scores
        with pytest.raises(SystemExit, match='--output'):
            sample_here(folder, *other, *flags)
    np.savez(tmp_path / 'ref.npz', arr_0=np.zeros((30, 16, 16, 3), np.uint8))
    with pytest.raises(SystemExit, match='--output'):
        sample_here(folder, '--sweep=cfg=1,2 top_k=0,8', *flags)
    with pytest.raises(SystemExit, match='top_k'):  # the second setting, before the first is drawn
        sample_here(tmp_path / 'none', '--sweep=top_k=8,900', *flags)
    assert not list((tmp_path / 'none').glob('*/pixels*')) and not list((tmp_path / 'none').glob('*.npz'))
    single = sample_here(tmp_path / 'one', '--cfg=2', '--top_k=8')
    assert np.array_equal(by_index(folder / 'cfg=2.0_top_k=8.npz'), single)
    np.savez(tmp_path / 'ref.npz', arr_0=reference)
    report = evaluation_report(tmp_path / 'ref.npz', tmp_path / 'one.npz')
    assert float(rows[3]['fid']) == pytest.approx(report['scores']['fid'], rel=1e-9)


def test_sweeps_notice_that_weights_are_replaced(sample_here, tmp_path, weights, monkeypatch):
    path, real = tmp_path / 'ckpt.pth', sample.score_images
    shutil.copy(weights[0], path)
    np.savez(tmp_path / 'ref.npz', arr_0=np.random.RandomState(0).randint(0, 256, (30, 16, 16, 3), np.uint8))

    def replace_and_score(settings, network):
        torch.save(torch.load(weights[0], weights_only=True) | dict(epoch=2), tmp_path / 'new.pth')
        (tmp_path / 'new.pth').rename(path)
        return real(settings, network)
    monkeypatch.setattr(sample, 'score_images', replace_and_score)
    with pytest.raises(SystemExit, match='was replaced during the sweep'):
        sample_here(tmp_path / 'sweep', f'--ckpt={path}', '--sweep=weights=ema,raw', '--format=npz',
                    f'--ref={tmp_path / "ref.npz"}', '--score=--features=digits --cache=')
    assert len(read_table(tmp_path / 'sweep.csv')) == 1


@pytest.mark.parametrize(('score', 'message'), [
    ('--features=digits --metrics=kid --real=nowhere.npz', 'found nothing at nowhere.npz'),
    ('--features=digits --metrics=fid,prdc --prdc_k=20', 'prdc needs at least 21 images'),
    ('--features=digits --metrics=fd_dinov2', 'no weights of dinov2_edm2'),
    ('--metrics=cmmd', 'no weights of clip336'),
    ('--metrics=fid', 'no Inception weights'),
])
def test_sweeps_look_first_for_what_the_scores_need(sample_here, tmp_path, monkeypatch, score, message):
    """And for nothing else: CMMD needs no Inception."""
    np.savez(tmp_path / 'ref.npz', arr_0=np.random.RandomState(0).randint(0, 256, (30, 16, 16, 3), np.uint8))
    for variable in ('INCEPTION_WEIGHTS', 'ENCODER_WEIGHTS'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.setattr(sample, 'sample_batch', None)
    with pytest.raises(SystemExit) as stop:
        sample_here(tmp_path / 'a', '--sweep=cfg=1,2', f'--ref={tmp_path / "ref.npz"}',
                    f'--score=--offline --cache={tmp_path / "cache"} {score}')
    assert message in str(stop.value)


def test_sweeps_without_inception(sample_here, tmp_path, monkeypatch):
    np.savez(tmp_path / 'ref.npz', arr_0=np.random.RandomState(0).randint(0, 256, (30, 16, 16, 3), np.uint8))
    monkeypatch.delenv('INCEPTION_WEIGHTS', raising=False)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    with pytest.raises(FileNotFoundError):  # a sweep packs no npz of its own
        sample_here(tmp_path / 'a', '--sweep=cfg=1', '--num_images=4', f'--ref={tmp_path / "ref.npz"}',
                    '--score=--offline --cache= --metrics=vendi --prdc_encoder=digits')
    row, = read_table(tmp_path / 'a.csv')
    assert 1 < float(row['vendi_digits_0.004k']) <= 4


def evaluation_report(ref, npz):
    return score_images(ScoreSettings(features='digits', ref=str(ref), sample=str(npz), allow_any_count=True,
                                      cache=''))


@pytest.mark.parametrize(('flags', 'message'), [
    (['--sweep=cgf=1,2', '--ref=a.npz'], "got 'cgf=1,2'"),
    (['--sweep=top_k=1.5', '--ref=a.npz'], 'values of type int for top_k'),
    (['--sweep=batch_size=1,2', '--ref=a.npz'], 'expects name=value'),
    (['--sweep=cfg=1,2'], '--ref'),
    (['--sweep=weights=ema,raww', '--ref=a.npz'], 'ema or raw'),
    (['--sweep=cfg=1 cfg=2', '--ref=a.npz'], 'cfg again'), (['--sweep= ', '--ref=a.npz'], 'name=value'),
    (['--sweep=cfg=1,2', '--ref=a.npz', "--score='a"], 'quotation'),
    (['--sweep=cfg=1,2', '--ref=a.npz', '--score=--help'], 'help'),
    (['--sweep=cfg=1,2', '--ref=a.npz', '--score=--features=digits --metrics=sfid'], 'spatial'),
    (['--output='], '--output'), (['--classes=99999999999999999999999'], '--classes'),
    (['--sweep=cfg=1,2', '--ref=a.npz', '--pack=0'], '--pack'),
    (['--sweep=cfg=1,2', '--ref=a.npz', '--score=x.npz y.npz'], 'ref, sample'),
    (['--sweep=cfg=1,2', '--ref=a.npz', '--score=--metric=fid'], '--metrics'),
    (['--sweep=cfg=1,2', '--ref=nowhere.npz', '--score=--features=digits'], 'nowhere.npz')])
def test_sweeps_are_checked_first(sample_here, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sample, 'sample_batch', None)
    with pytest.raises(SystemExit) as stop:
        sample_here(tmp_path / 'a', *flags)
    assert message in capsys.readouterr().err + str(stop.value)
