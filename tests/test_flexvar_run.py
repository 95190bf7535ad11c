"""FlexVAR through train.py and sample.py: exact resume, accumulation, sizes and steps by flags."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import sample
import train
from configs import parse_recipe
from evaluation.features import FeatureSet
from models import VQVAE, FlexVAE, FlexVAR
from tests.runs import BATCH, TINY_VQVAE, launch, make_folder, read
from training.fid import build_training_fid

PYRAMID = (1, 2, 3, 4, 6)


class Interrupt(Exception):
    pass


@pytest.fixture(scope='module')
def flags(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    torch.manual_seed(0)
    torch.save(FlexVAE(24, 8, z_channels=16, net='tiny').state_dict(), root / 'vae.pth')
    return ['--model=flexvar', f'--data_path={make_folder(root / "images")}',
            f'--vae_ckpt={root / "vae.pth"}', '--pn=1_2_3_4_6', '--patch_size=8', f'--bs={BATCH}',
            '--workers=0', '--seed=3', '--depth=1', '--alng=1e-2', '--tblr=1e-2', '--drop_path=0.2']


@pytest.fixture(scope='module')
def trained(flags, tmp_path_factory):
    """A training of two epochs with averaged weights."""
    folder = tmp_path_factory.mktemp('trained')
    launch('train.py', [*flags, '--ep=2', '--ema=0.9', f'--output_dir={folder}'])
    return folder


def largest_difference(a, b):
    return max((t - b['trainer']['var_wo_ddp'][name]).abs().max().item()
               for name, t in a['trainer']['var_wo_ddp'].items())


def test_resume_is_exact(flags, here, trained, tmp_path, monkeypatch):
    """Also of the pyramids, which follow from seed and step."""
    step = train.Run.train_step

    def interrupted(self, images, labels, number):
        if number == 7:
            raise Interrupt
        return step(self, images, labels, number)
    settings = (*flags, '--ep=2', '--ema=0.9', '--save_every=3', f'--output_dir={tmp_path}')
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(train.Run, 'train_step', interrupted)
        here(train, *settings)
    assert read(tmp_path)['iter'] == 1
    here(train, *settings)
    final, expected = read(tmp_path), read(trained)
    for key in ('var_wo_ddp', 'var_ema'):
        assert all(torch.equal(t, expected['trainer'][key][name])
                   for name, t in final['trainer'][key].items())
    logged = [json.loads(line) for line in (tmp_path / 'steps.jsonl').read_text().splitlines()]
    pyramids = {tuple(key for key in line if key.startswith('L_')) for line in logged}
    assert len(pyramids) > 3, 'the pyramid changes from step to step'


def test_micro_steps_share_the_pyramid(flags, here, trained, tmp_path):
    here(train, *flags, '--ep=2', '--ema=0.9', '--ac=4', f'--output_dir={tmp_path}')
    assert largest_difference(read(tmp_path), read(trained)) < 1e-6


@pytest.mark.slow
def test_ranks_share_the_pyramid(flags, trained, tmp_path):
    launch('train.py', [*flags, '--ep=2', '--ema=0.9', f'--output_dir={tmp_path}'], nproc=2)
    assert largest_difference(read(tmp_path), read(trained)) < 1e-6


def test_larger_training_images(flags, here, trained, tmp_path):
    """--final_reso averages the same sides over more pixels: another training of the same model."""
    here(train, *flags, '--ep=1', '--final_reso=64', '--keep_last=1', f'--output_dir={tmp_path}')
    assert read(tmp_path)['trainer']['config']['patch_nums'] == list(PYRAMID)
    assert largest_difference(read(tmp_path), read(trained)) > 1e-3


def test_distance_is_to_images_of_the_sampled_size(monkeypatch):
    """Training may see larger images than it draws; the reference of the distance has the smaller size."""
    model = FlexVAR(FlexVAE(24, 8, z_channels=16, net='tiny', test_mode=True), num_classes=10,
                    patch_nums=(1, 2, 4), **FlexVAR.published_sizes(1)).eval()
    sizes, add = [], FeatureSet.add
    monkeypatch.setattr(FeatureSet, 'add',
                        lambda self, images, first: sizes.append(images.shape) or add(self, images, first))
    recipe = parse_recipe(['--model=flexvar', '--fid_images=4', '--fid_features=digits',
                           '--fid_flags=--top_k=0'])
    loader = DataLoader([(torch.rand(3, 64, 64), 0)] * 4, batch_size=2)
    assert build_training_fid(recipe, model, loader).name == 'fid_0.004k'
    assert sizes == [(2, 3, 32, 32)] * 2


def test_another_pyramid_is_refused_on_resume(flags, here, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'a')
    with pytest.raises(SystemExit, match=r'with the sides \[1, 2, 3, 4, 6\], got \[1, 2, 4, 6\]: pass'):
        here(train, *flags, '--ep=3', '--ema=0.9', '--pn=1_2_4_6', f'--output_dir={tmp_path / "a"}')


def test_tokenizer_of_var_is_refused(flags, here, tmp_path):
    """Its file looks like that of a FlexVAE until one reads what it says beside the weights."""
    vae = VQVAE(**TINY_VQVAE)
    torch.save(dict(trainer=dict(vae_local=vae.state_dict(), vae_config=vae.config_state(1.))),
               tmp_path / 'vqvae.pth')
    with pytest.raises(SystemExit, match=r'vqvae\.pth holds no FlexVAE weights'):
        here(train, *flags, f'--vae_ckpt={tmp_path / "vqvae.pth"}', f'--output_dir={tmp_path / "a"}')


def test_larger_images_than_in_training_are_announced(here, trained, tmp_path, capsys):
    drawn(here, trained, tmp_path / 'a', '--infer_patch_nums=1_2_4_8')
    assert 'ends at 8, the model was trained up to 6' in ''.join(capsys.readouterr())
    images, _ = drawn(here, trained, tmp_path / 'b', '--preset=fid', '--num_images=2')
    assert images.shape == (2, 48, 48, 3) and 'trained up to' not in ''.join(capsys.readouterr())


def test_spelling_and_checks_are_no_other_job(here, trained, tmp_path):
    drawn(here, trained, tmp_path / 'a', '--infer_patch_nums=1_2_3')
    drawn(here, trained, tmp_path / 'a', '--infer-patch-nums=1-2-3', '--depth=1')


def drawn(here, trained, output, *more):
    """Images by index, and the manifest."""
    here(sample, '--model=flexvar', f'--var_ckpt={trained / "ar-ckpt-last.pth"}', '--num_images=6',
         '--shuffle=-1', f'--output={output}', *more, '--top_k=20')
    return np.load(f'{output}.npz')['arr_0'], json.loads(output.with_suffix('.json').read_text())


def test_images_do_not_depend_on_the_batch(here, trained, tmp_path):
    """Without a list of sides, those of the checkpoint."""
    six, manifest = drawn(here, trained, tmp_path / 'a', '--maxpn=16', '--cfg=2.5', '--depth=1')
    assert six.shape == (6, 48, 48, 3)
    assert manifest['settings']['maxpn'] == 16 and manifest['weights'] == 'ema'
    one, _ = drawn(here, trained, tmp_path / 'b', '--batch_size=1', '--infer_patch_nums=1-2-3-4-6')
    difference = np.abs(six.astype(int) - one.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(('more', 'size'), [
    (['--infer_patch_nums=1_3'], (24, 24)),
    (['--infer_patch_nums=1_2_3_4_5_6_7_8_9', '--greedy_unseen=0'], (72, 72)),
    (['--size=32x56', '--pos_mode=crop'], (32, 56)),
])
def test_steps_and_sizes(here, trained, tmp_path, more, size):
    images, _ = drawn(here, trained, tmp_path / 'a', *more)
    assert images.shape == (6, *size, 3) and len(np.unique(images.reshape(6, -1), axis=0)) > 3


@pytest.mark.parametrize(('more', 'message'), [
    ('--depth=2', r'--depth=2, but .*ar-ckpt-last.pth has 1 blocks: pass the file of that depth'),
    ('--infer_patch_nums=2_4', 'must begin with 1 and .*got 2_4'),
    ('--infer_patch_nums=1_3_2', 'from coarse to fine, got 1_3_2'),
    ('--infer_patch_nums=1_two', "joined by \"_\".*got '1_two'"),
    ('--size=48x', "rows x columns in pixels, such as 384x256, or one number for squares, got '48x'"),
    ('--size=48x50', 'multiples of the stride 8, got 48x50'),
    ('--pos_mode=tile', "stretch or crop, got 'tile'"),
    ('--maxpn=-1', '--maxpn must be at least 0'),
    ('--more_smooth=1', '--more_smooth'),
    ('--sweep=depth=1,2', 'name=value,value with a name of'),
])
def test_bad_sampling_flags(here, trained, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        drawn(here, trained, tmp_path / 'a', more, '--ref=x.npz')
    error = capsys.readouterr().err or stop.value.code  # flags are refused by the parser, the rest later
    assert re.search(message, error) and len(error.splitlines()) == 1, error
    assert not (tmp_path / 'a.npz').exists()
