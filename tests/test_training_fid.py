"""The distance of samples that a training draws: what it equals, what it leaves alone, what it refuses."""
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import extract
import sample
import train
from configs import parse_sampling, parse_training
from evaluation import digits_features as digits
from evaluation.features import FeatureSet
from evaluation.metrics import to_uint8
from evaluation.score import ScoreSettings, score_images
from models import FlexVAE, FlexVAR
from tests.runs import assert_equal, epochs_of, extraction, launch, read, same_weights, training
from training.fid import build_training_fid
from utils.data import build_dataset

WITHOUT_FID = ['--ep=2', '--eval_every=1', '--ema=0.9']
WITH_FID = [*WITHOUT_FID, '--fid_images=20', '--fid_features=digits', '--fid_flags=--cfg=2 --top_k=8 --bs=7']


@pytest.fixture
def random_features(monkeypatch):
    """In the place of fitted ones, which take seconds."""
    rng = np.random.RandomState(0)
    monkeypatch.setattr(digits, '_fit', lambda sizes: [
        array for inputs, outputs in pairwise((digits.SIDE ** 2, *sizes, 10))
        for array in (rng.randn(outputs, inputs) / inputs ** 0.5, np.zeros(outputs))])


@pytest.fixture(scope='module')
def folder(train_for_module, tmp_path_factory):
    """A training of two epochs with a distance after each."""
    return train_for_module(tmp_path_factory.mktemp('fid'), *WITH_FID)


def curve_of(folder):
    return [line['fid_0.02k'] for line in epochs_of(folder) if 'fid_0.02k' in line]


def test_distance_is_logged_after_every_epoch(folder):
    curve = curve_of(folder)
    assert len(curve) == 2
    assert curve[0] != curve[1]
    assert min(curve) > 0
    scalars = EventAccumulator(str(next(folder.glob('tb-*')))).Reload()
    assert [event.value for event in scalars.Scalars('AR_ep_loss/fid_0.02k')] == pytest.approx(curve)


def test_distance_is_that_of_sampling_and_scoring_afterwards(folder, data, tmp_path):
    """From the checkpoint: averaged weights, the same noise, the same reference."""
    flags = [f'--ckpt={folder / "ar-ckpt-last.pth"}', '--num_images=20', f'--output={tmp_path / "drawn"}']
    sample.sample(parse_sampling([*flags, '--cfg=2', '--top_k=8', '--bs=7']))
    pictures = [image for image, _ in build_dataset(str(data[0]), 16)[2]]
    np.savez(tmp_path / 'val.npz', arr_0=to_uint8(torch.stack(pictures)).permute(0, 2, 3, 1).numpy())
    report = score_images(ScoreSettings(features='digits', ref=str(tmp_path / 'val.npz'), cache='',
                                        sample=str(tmp_path / 'drawn.npz'), allow_any_count=True))
    assert report['scores']['fid'] == pytest.approx(curve_of(folder)[-1], rel=1e-3)


def test_distance_changes_nothing_of_the_training(folder, train_here, tmp_path):
    plain = read(train_here(tmp_path, *WITHOUT_FID))
    assert same_weights(plain, read(folder))
    assert same_weights(plain, read(folder), 'var_ema')


@pytest.mark.slow
def test_two_processes_draw_the_same_distance(folder, data, tmp_path):
    launch('train.py', training(data, tmp_path, *WITH_FID, model='var'), nproc=2)
    assert curve_of(tmp_path)[-1] == pytest.approx(curve_of(folder)[-1], rel=1e-3)


@pytest.mark.slow
def test_distance_of_continuous_codes_changes_nothing(whole_training, trained_folder, here, tmp_path,
                                                      random_features):
    here(train, *whole_training('flowar', tmp_path, '--fid_images=8', '--fid_features=digits',
                                '--fid_flags=--cfg=2 --flow_upper_steps=8 --flow_lower_steps=4 --eval_bsz=3'))
    distance, = [line['fid_0.008k'] for line in epochs_of(tmp_path) if 'fid_0.008k' in line]
    assert 0 < distance < math.inf
    assert_equal(read(tmp_path)['trainer'], read(trained_folder('flowar'))['trainer'])


def test_distance_that_a_kill_prevented_is_drawn_by_the_next_start(folder, train_here, tmp_path, monkeypatch):
    straight = [line for line in epochs_of(folder) if 'fid_0.02k' in line]

    def killed(self, epoch):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='interrupted'):
        patch.setattr(train.Run, 'measure_distance', killed)
        train_here(tmp_path, *WITH_FID)
    train_here(tmp_path, *WITH_FID)
    lines = epochs_of(tmp_path)
    assert [line for line in lines if 'fid_0.02k' in line] == straight
    assert [line['ep'] for line in lines] == ['1/2', '1/2', '2/2', '2/2']  # an epoch, then its distance
    train_here(tmp_path, *WITH_FID)  # nothing is left to draw
    assert epochs_of(tmp_path) == lines


def test_missing_inception_weights_do_not_stop_a_training(train_here, tmp_path, monkeypatch):
    monkeypatch.setenv('INCEPTION_WEIGHTS', str(tmp_path / 'nowhere.pth'))
    train_here(tmp_path / 'a', '--ep=1', '--fid_images=20')
    text = (tmp_path / 'a' / 'stdout.txt').read_text()
    assert '--fid_images is off: no Inception weights at' in text and 'nowhere.pth' in text
    assert not any(name.startswith('fid') for name in epochs_of(tmp_path / 'a')[-1])


def test_distance_is_to_images_of_the_sampled_size(monkeypatch):
    """Training may see larger images than it draws; the reference of the distance has the smaller size."""
    model = FlexVAR(FlexVAE(24, 8, z_channels=16, net='tiny', test_mode=True), num_classes=10,
                    patch_nums=(1, 2, 4), **FlexVAR.published_sizes(1)).eval()
    sizes, add = [], FeatureSet.add
    monkeypatch.setattr(FeatureSet, 'add',
                        lambda self, images, first: sizes.append(images.shape) or add(self, images, first))
    config = parse_training(['--model=flexvar', '--fid_images=4', '--fid_features=digits',
                           '--fid_flags=--top_k=0'])
    loader = DataLoader([(torch.rand(3, 64, 64), 0)] * 4, batch_size=2)
    assert build_training_fid(config, model, loader).name == 'fid_0.004k'
    assert sizes == [(2, 3, 32, 32)] * 2


@pytest.mark.parametrize(('flag', 'word'), [
    ('--fid_flags=--top_q=3', '--top_p'), ('--fid_flags=--cfg=x', '--cfg'),
    ('--fid_flags=--classes=3', 'classes'), ('--fid_flags=--top_k=900', 'top_k'),
    ("--fid_flags='", 'quotation'),
    ('--fid_ref=nowhere.npz', 'nowhere.npz'), ('--inception_weights=nowhere.pth', 'nowhere.pth')])
def test_flags_of_the_distance_are_checked_first(train_here, tmp_path, capsys, flag, word):
    features = '--fid_features=' + ('inception' if 'inception' in flag else 'digits')
    with pytest.raises(SystemExit) as stop:
        train_here(tmp_path, '--ep=1', '--fid_images=20', features, flag)
    assert word in capsys.readouterr().err + str(stop.value)
    assert not (tmp_path / 'ar-ckpt-last.pth').exists()


def test_distance_of_a_training_on_tokens(families, here, tmp_path, random_features):
    here(extract, *extraction(families['var'], tmp_path / 'cache', model='var'))
    here(train, *training(families['var'], tmp_path / 'out', f'--cached_path={tmp_path / "cache"}', *WITH_FID,
                          model='var'))
    curve = curve_of(tmp_path / 'out')
    assert len(curve) == 2 and min(curve) > 0 and curve[0] != curve[1]


def test_tokens_are_no_reference_of_distances(families, here, tmp_path, random_features):
    for split in ('train', 'val'):
        here(extract, *extraction(families['flowar'], tmp_path / split, f'--split={split}'))
    cached = f'--cached_path={tmp_path / "train"}', f'--cached_val_path={tmp_path / "val"}'
    flags = [*cached, '--fid_images=4', '--fid_features=digits']
    with pytest.raises(SystemExit, match=r'^train: .*--cached_val_path.*--fid_ref'):
        here(train, *training(families['flowar'], tmp_path / 'a', *flags))
