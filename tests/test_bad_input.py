"""Input that cannot be right: one line says what is wrong and what to do, and nothing is overwritten."""
import shutil

import pytest
import torch

import train
from models import VAR, VQVAE
from tests.runs import TINY_VQVAE, VQVAE_FLAGS, make_folder, message, read


# ---------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(('flags', 'words'), [
    (['--data_path=/nowhere'], ['/nowhere/train', '--data_path']),
    (['--num_classes=5'], ['--num_classes=5', '4 classes']),
    (['--num_clases=4'], ['--num_clases', '--num_classes']),
    (['--bs=9', '--ac=2'], ['--bs=9', '--bs=8']),
    (['--vae_ckpt=vae_ch160v4096z3.pth'], ['vae_ch160v4096z3.pth', 'vae_ch160v4096z32.pth']),
    (['--patch_size=8'], ['stride 4', '--patch_size=4']),
    (['--output_dir=/proc/nowhere'], ['/proc/nowhere', 'another one'])])
def test_bad_settings(train_here, tmp_path, capsys, flags, words):
    text = message(lambda: train_here(tmp_path, '--ep=1', *flags), capsys)
    assert all(word in text for word in words), text
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize(('flags', 'words'), [
    (['--lpips=vgg'], ['vgg16-397923af.pth', '528 MB', 'vgg.pth', 'd507d7349b931f0638a25a48a722f98a',
                       '--lpips=none']),
    (['--lpips=vgg', '--lpips_path={heads}'], ['heads.pth', 'only the linear heads', '--lpips_vgg']),
    (['--lpips=vgg', '--lpips_vgg={wrong}', '--lpips_lin={heads}'],
     ['vgg16-397923af.pth', '397923af8e79cdbb']),
    (['--disc=dino'], ['DINO', '--dino_path']),
    (['--fp16=1'], ['float16', '--fp16=2']),
    (['--init_from=/nowhere.pth'], ['/nowhere.pth']),
    (['--disc=patchgan', '--disc_start=0'], ['at least 32 pixels', '16'])])
def test_bad_tokenizer_settings(train_here, tmp_path, capsys, monkeypatch, flags, words):
    heads, wrong = tmp_path / 'heads.pth', tmp_path / 'vgg16-397923af.pth'
    torch.save({f'lin{i}.model.1.weight': torch.rand(1, channels, 1, 1)
                for i, channels in enumerate((64, 128, 256, 512, 512))}, heads)
    torch.save({'features.0.weight': torch.zeros(64, 3, 3, 3)}, wrong)
    flags = [flag.format(heads=heads, wrong=wrong) for flag in flags]
    monkeypatch.chdir(tmp_path)
    text = message(lambda: train_here(tmp_path / 'run', '--ep=1', *flags, base=VQVAE_FLAGS), capsys)
    assert all(word in text for word in words), text


def test_non_finite_loss_stops_with_a_line(train_here, tmp_path, capsys):
    flags = '--ep=2', '--tblr=1e12', '--tclip=0', '--max_skipped_steps=4'
    text = message(lambda: train_here(tmp_path, *flags), capsys)
    assert 'not finite' in text and 'lower the learning rate' in text


# ---------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_unreadable_images_are_replaced_and_listed_up_to_a_limit(train_here, tmp_path, capsys, workers):
    root = make_folder(tmp_path / 'images')
    (root / 'train' / 'bee' / '01.png').write_bytes(b'broken')
    flags = '--ep=2', f'--data_path={root}', f'--workers={workers}'
    checkpoint = read(train_here(tmp_path / 'out', *flags))
    assert len(checkpoint['run']['bad_images']) == 1 and "bee/01.png'" in checkpoint['run']['bad_images'][0]
    log = (tmp_path / 'out' / 'stdout.txt').read_text()
    assert log.count('an image is replaced by another one') == 1  # though it came in both epochs
    assert '1 images could not be read' in log
    text = message(lambda: train_here(tmp_path / 'none', *flags, '--max_bad_images=0'), capsys)
    assert "bee/01.png'" in text and '--max_bad_images=0' in text

    # an image of the validation is never replaced
    (root / 'val' / 'cow' / '02.png').write_bytes(b'broken')
    text = message(lambda: train_here(tmp_path / 'val', *flags), capsys)
    assert "cow/02.png'" in text and 'repair or remove' in text
    assert 'Traceback' in (tmp_path / 'val' / 'stdout.txt').read_text()  # the details are kept


# ---------------------------------------------------------------------------------------------- checkpoints
# flags, by family, under which the checkpoint in the output folder is of another model
OTHER_RUNS = [
    ('var', '--depth=2', 'depth=1 (here 2)'),
    ('var', '--pn=1_3_4', 'patch_nums=(1, 2, 4) (here (1, 3, 4))'),
    ('var', '--saln=1', 'shared_aln=False (here True)'),
    ('var', '--seed=4', 'begun with seed 3, got --seed=4'),
    ('flexvar', '--pn=1_2_4_6', 'with the sides [1, 2, 3, 4, 6], got [1, 2, 4, 6]: pass'),
    ('flowar', '--img_size=64', 'ar-ckpt-last.pth is a FlowAR with scale=(1, 2, 4) (here (1, 2, 4, 8)): ch'),
    ('flowar', '--size=large', 'cross=False (here True): change the flags'),
    ('flowar', '--seed=1', 'begun with seed 0, got --seed=1'),
    ('npp', '--width=128', 'dim=64 (here 128)'),
    ('npp', '--depth=2', 'n_layer=1 (here 2): change the flags')]


@pytest.mark.parametrize(('model', 'flag', 'words'), OTHER_RUNS)
def test_checkpoint_of_another_run(whole_training, trained_folder, stops, tmp_path, model, flag, words):
    shutil.copytree(trained_folder(model), tmp_path, dirs_exist_ok=True)
    before = (tmp_path / 'ar-ckpt-last.pth').read_bytes()
    line = stops(train, *whole_training(model, tmp_path, '--ep=5', flag))
    assert words in line, line
    assert (tmp_path / 'ar-ckpt-last.pth').read_bytes() == before


def test_checkpoint_of_another_family(trained_folder, whole_training, stops, tmp_path):
    shutil.copy(trained_folder('var') / 'ar-ckpt-last.pth', tmp_path)
    line = stops(train, *whole_training('flowar', tmp_path, '--seed=3'))
    assert 'was trained with --model=var, got --model=flowar: correct it' in line


@pytest.fixture(scope='module')
def tokenizers_of_var(tmp_path_factory):
    """The VQVAE of a VAR: bare, beside its settings, and inside a checkpoint of that VAR."""
    folder = tmp_path_factory.mktemp('var')
    vae = VQVAE(**TINY_VQVAE)
    model = VAR(vae, num_classes=4, patch_nums=TINY_VQVAE['v_patch_nums'], **VAR.published_sizes(1))
    trainer = dict(vae_local=vae.state_dict(), vae_config=vae.config_state(1.))
    torch.save(vae.state_dict(), folder / 'bare.pth')
    torch.save(dict(trainer=trainer), folder / 'config.pth')
    torch.save(dict(epoch=1, iter=0, trainer=trainer | dict(var_wo_ddp=model.state_dict()),
                    args=dict(model='var')), folder / 'checkpoint.pth')
    return folder


@pytest.mark.parametrize(('model', 'flag', 'name', 'words'), [
    ('flexvar', 'vae_ckpt', 'config', 'config.pth holds no FlexVAE weights'),
    ('flowar', 'vae_path', 'bare', 'AutoencoderKL'),
    ('flowar', 'vae_path', 'checkpoint', 'AutoencoderKL')])
def test_tokenizer_of_var_is_refused(whole_training, tokenizers_of_var, stops, tmp_path, model, flag, name,
                                     words):
    """Its weights have the names of a KL-16; those of a FlexVAE only differ in what stands beside them."""
    path = tokenizers_of_var / f'{name}.pth'
    line = stops(train, *whole_training(model, tmp_path, f'--{flag}={path}'))
    assert words in line
    assert f'{name}.pth holds no' in line or f'{name}.pth does not fit' in line


def test_tokenizer_settings_that_a_checkpoint_cannot_follow(train_here, tmp_path, capsys):
    train_here(tmp_path, '--ep=1', base=VQVAE_FLAGS)
    text = message(lambda: train_here(tmp_path, '--ep=2', '--ema=0', base=VQVAE_FLAGS), capsys)
    assert '--ema' in text and '--init_from' in text


def test_checkpoint_of_another_vocabulary(train_here, tmp_path, capsys):
    train_here(tmp_path / 'vae', '--ep=1', '--vocab_size=64', base=VQVAE_FLAGS)
    train_here(tmp_path / 'var', '--ep=1')
    text = message(lambda: train_here(tmp_path / 'var', '--ep=2',
                                      f'--vae_ckpt={tmp_path}/vae/vae-ckpt-last.pth'), capsys)
    assert 'vocab_size=32 (here 64)' in text


def test_generator_file_as_tokenizer(train_here, tmp_path, capsys):
    train_here(tmp_path, '--ep=1')
    flat = tmp_path / 'flat.pth'
    torch.save(read(tmp_path)['trainer']['var_wo_ddp'], flat)
    text = message(lambda: train_here(tmp_path / 'b', '--ep=1', f'--vae_ckpt={flat}'), capsys)
    assert 'holds no VQVAE' in text
