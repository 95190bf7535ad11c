"""Averages of the weights: several at once, and those of any width after the training."""
import json
import logging
import re

import numpy as np
import pytest
import torch
from torch import nn

import sample
from configs import parse_training
from tests.runs import VAR_FLAGS, VQVAE_FLAGS, assert_equal, interrupt, message, prepared, read
from tests.vectors import load_json, load_tensors
from training.snapshots import rewind_snapshots
from utils import posthoc_ema
from utils.checkpoint import tokenizer_weights
from utils.ema import PowerEMA, exponent_of, width_of
from utils.posthoc_ema import PosthocSettings, factors_of, make_averages, overlap

GOLDEN, VECTORS = load_json('post_training/phema'), load_tensors('post_training/phema')
TIMES = np.array(GOLDEN['snapshot_steps'])
EXPONENTS = np.array([exponent_of(width) for width in GOLDEN['snapshot_stds']])


class Point(nn.Module):
    """Weights that are set by hand."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(weights.clone())
        self.register_buffer('counter', torch.zeros(()))

    def move(self, weights):
        self.weights.data.copy_(weights)
        self.counter += 1


# ---------------------------------------------------------------------------------------------- profiles
def test_exponents_widths_and_decays_are_the_published_ones():
    for width, exponent in GOLDEN['std_to_exponent']:
        assert exponent_of(width) == pytest.approx(exponent, abs=1e-9 * max(exponent, 1))
    for exponent, width in GOLDEN['exponent_to_std']:
        assert width_of(exponent) == pytest.approx(width, abs=1e-9)
    for row in GOLDEN['beta']:
        profile = PowerEMA(Point(torch.zeros(1)), row['std'])
        profile.num_updates = row['t_next'] / row['t_delta'] - 1
        assert profile.next_decay() == pytest.approx(row['beta'], abs=1e-12)


def test_averages_on_a_path_are_the_published_ones():
    """The start is forgotten at once, buffers are copied."""
    path_TD = VECTORS['path_TD']
    model = Point(path_TD[0])
    profiles = [PowerEMA(model, width) for width in (0.05, 0.1)]
    found = []
    for t, weights_D in enumerate(path_TD[1:], 1):
        model.move(weights_D)
        for profile in profiles:
            profile.update()
            if t % 5 == 0:
                found.append(profile.averaged_weights()['weights'].clone())
        if t == 1:
            assert torch.equal(profiles[0].weights['weights'], weights_D)
    assert (torch.stack(found) - VECTORS['snapshots_ND']).abs().max() < 1e-9
    assert profiles[0].weights['counter'] == 40 and 'counter' not in profiles[0].averaged_weights()


def test_factors_of_other_widths_are_the_published_ones():
    gram = overlap(TIMES[:, None], EXPONENTS[:, None], TIMES[None], EXPONENTS[None])
    np.testing.assert_allclose(gram, VECTORS['gram_NN'].numpy(), rtol=1e-9)
    for row in GOLDEN['reconstructions']:
        factor_S, _ = factors_of(TIMES, EXPONENTS, row['out_step'], exponent_of(row['std']))
        np.testing.assert_allclose(factor_S, row['coefficients'], rtol=0, atol=1e-7)
        weights_D = factor_S @ VECTORS['snapshots_ND'].numpy()
        np.testing.assert_allclose(weights_D, row['reconstructed'], rtol=1e-7)


def test_a_stored_width_is_itself_and_constants_stay():
    for i in (15, 10):
        before = TIMES[i] >= TIMES
        factor_S, residual = factors_of(TIMES[before], EXPONENTS[before], TIMES[i], EXPONENTS[i])
        assert np.abs(factor_S - np.eye(len(factor_S))[i]).max() < 1e-6 and residual < 1e-6
    residuals = []
    for width in (0.02, 0.04, 0.07, 0.15):
        factor_S, residual = factors_of(TIMES, EXPONENTS, 40, exponent_of(width))
        assert factor_S.sum() == pytest.approx(1, abs=1e-12)  # so that a constant stays that constant
        residuals.append(residual)
    assert residuals[0] > posthoc_ema.LARGEST_RESIDUAL > residuals[1] and residuals[2] < 0.02


def test_on_a_straight_path_the_average_is_where_theory_says():
    """The mean of the profile is t (g + 1) / (g + 2), for tracked widths and for those made of them."""
    model = Point(torch.zeros(1, dtype=torch.float64))
    profiles = [PowerEMA(model, width) for width in (0.05, 0.1)]
    stored = []
    for t in range(1, 1001):
        model.move(torch.full((1,), float(t)))
        for profile in profiles:
            profile.update()
            if t % 50 == 0:
                stored.append((t, profile.exponent, profile.weights['weights'].item()))
    time_S, exponent_S, value_S = map(np.array, zip(*stored, strict=True))
    for width in (0.05, 0.07, 0.1, 0.15):
        factor_S, _ = factors_of(time_S, exponent_S, 1000, exponent_of(width))
        g = exponent_of(width)
        assert factor_S @ value_S == pytest.approx(1000 * (g + 1) / (g + 2), abs=1)


# ---------------------------------------------------------------------------------------------- snapshots
PROFILES = '--ema_profiles=0.05,0.1', '--ema_snapshot=2'


@pytest.fixture(scope='module')
def profiled(train_for_module, tmp_path_factory):
    """A finished training of ten steps whose averages were stored."""
    folder = tmp_path_factory.mktemp('profiled')
    return train_for_module(folder, '--ep=2', *PROFILES)


def index_of(folder):
    return [json.loads(line) for line in (folder / 'snapshots' / 'index.jsonl').read_text().splitlines()]


def test_averages_are_stored_and_change_nothing_else(train_here, profiled, tmp_path):
    plain = read(train_here(tmp_path, '--ep=2'))
    assert not (tmp_path / 'snapshots').exists()
    checkpoint = read(profiled)
    new = {'ema_profiles', 'profile_updates'}
    assert {*checkpoint['trainer']} - {*plain['trainer']} == new
    assert_equal({name: part for name, part in checkpoint['trainer'].items() if name not in new},
                 plain['trainer'])
    lines = index_of(profiled)
    assert [(line['step'], line['updates'], line['width']) for line in lines] == [
        (step, step, width) for step in (2, 4, 6, 8, 10) for width in (0.05, 0.1)]
    assert {path.name for path in (profiled / 'snapshots').iterdir()} == {
        'index.jsonl', *(line['file'] for line in lines)}
    last = read(profiled / 'snapshots', lines[-1]['file'])['model']
    assert_equal(last, checkpoint['trainer']['ema_profiles']['0.1'])


@pytest.mark.slow
def test_a_killed_training_stores_the_same_averages(train_here, profiled, tmp_path):
    """What is later than the checkpoint is removed; the same steps then write the same bytes."""
    flags = '--ep=2', '--save_every=3', *PROFILES
    interrupt(lambda: train_here(tmp_path, *flags), 4)
    assert (index_of(tmp_path)[-1]['step'], read(tmp_path)['iter']) == (4, 3)
    (tmp_path / 'snapshots' / '00000008-0.05.pth').write_bytes(b'of a run that was killed before its line')
    rewind_snapshots(tmp_path, 3)  # as the next start does it
    assert [line['step'] for line in index_of(tmp_path)] == [2, 2]
    assert {path.name for path in (tmp_path / 'snapshots').iterdir()} == {
        'index.jsonl', '00000002-0.05.pth', '00000002-0.1.pth'}
    train_here(tmp_path, *flags)
    assert index_of(tmp_path) == index_of(profiled)
    assert_equal(read(tmp_path)['trainer'], read(profiled)['trainer'])


def test_profiles_must_stay_as_they_were(train_here, profiled, tmp_path, capsys):
    flags = '--ep=3', '--ema_profiles=0.05,0.2', '--ema_snapshot=2'
    text = message(lambda: train_here(profiled, *flags), capsys)
    assert 'holds no average of width 0.2' in text and '--ema_profiles' in text


def test_any_width_becomes_a_file_for_sampling(here, profiled, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    out = f'{tmp_path}/width_{{}}.pth'
    make_averages(PosthocSettings(run=str(profiled), width='0.1,0.07,0.01', out=out))
    tracked, other = (torch.load(out.format(width)) for width in (0.1, 0.07))
    expected = read(profiled)['trainer']['ema_profiles']['0.1']
    for name, value in tracked['trainer']['var_wo_ddp'].items():
        if name in expected:
            assert (value - expected[name]).abs().max() < 1e-6, name
        else:
            assert torch.equal(value, read(profiled)['trainer']['var_wo_ddp'][name]), name
    head = 'head.weight'
    assert not torch.allclose(other['trainer']['var_wo_ddp'][head], expected[head], atol=1e-6)
    assert other['posthoc_ema']['step'] == 10 and len(other['posthoc_ema']['files']) == 10
    assert re.findall(r'width (\S+) cannot be made', caplog.text) == ['0.01']
    earlier = PosthocSettings(run=str(profiled), width='0.05', out=f'{tmp_path}/at.pth', step=7)
    make_averages(earlier)
    at_six = read(profiled / 'snapshots', '00000006-0.05.pth')['model']
    assert (torch.load(earlier.out)['trainer']['var_wo_ddp'][head] - at_six[head]).abs().max() < 1e-6
    here(sample, f'--ckpt={out.format(0.07)}', '--num_images=4', f'--output={tmp_path / "images"}')
    assert np.load(tmp_path / 'images.npz')['arr_0'].shape == (4, 16, 16, 3)
    assert json.loads((tmp_path / 'images.json').read_text())['classes']


@pytest.mark.parametrize(('change', 'words'), [
    (dict(width=''), 'pass RUN --width'), (dict(width='0.1,x'), '--width: expected numbers'),
    (dict(width='0.3'), r'--width must be in \[0.005, 0.288\], got 0.3'),
    (dict(width='0.1,0.2'), '--out must hold {} for each of 2'), (dict(run='/nowhere'), 'none: train with'),
    (dict(step=1), 'the first averages are those of step 2'), (dict(damaged=True), 'is another file than'),
    (dict(over_a_checkpoint=True), '--out must not be a checkpoint')])
def test_bad_requests_are_one_line(profiled, tmp_path, change, words):
    run = profiled
    if change.pop('damaged', False):
        run = tmp_path / 'copy'
        (run / 'snapshots').mkdir(parents=True)
        for path in (profiled / 'snapshots').iterdir():
            (run / 'snapshots' / path.name).write_bytes(path.read_bytes())
        torch.save(dict(model={}), run / 'snapshots' / '00000004-0.1.pth')
    if change.pop('over_a_checkpoint', False):
        change['out'] = str(run / 'ar-ckpt-last.pth')
    request = dict(run=str(run), width='0.1', out=str(tmp_path / 'x.pth')) | change
    with pytest.raises(ValueError, match=words):
        make_averages(PosthocSettings(**request))
    assert not (tmp_path / 'x.pth').exists()


# ---------------------------------------------------------------------------------------------- several
@pytest.mark.slow
def test_several_averages_are_those_of_single_ones(train_here, tmp_path, capsys):
    """The first one is evaluated, and has the published key and the settings of a single one."""
    flags = '--ep=1', '--ema_warmup=0'
    several = read(train_here(tmp_path / 'several', *flags, '--ema=0.9,0.5'))
    first = read(train_here(tmp_path / 'first', *flags, '--ema=0.9'))
    second = read(train_here(tmp_path / 'second', *flags, '--ema=0.5'))
    assert_equal({name: part for name, part in several['trainer'].items() if name != 'var_ema_0.5'},
                 first['trainer'])
    assert_equal(several['trainer']['var_ema_0.5'], second['trainer']['var_ema'])
    assert type(first['args']['ema']) is float and several['args']['ema'] == '0.9,0.5'
    assert several['run'] == first['run']

    def weights(name):
        path = str(tmp_path / 'several' / 'ar-ckpt-last.pth')
        generator, origin = sample.load_generator('var', path, '', name, torch.device('cpu'))
        return generator.state_dict(), origin['weights']
    state, kind = weights('ema_0.5')
    assert kind == 'ema_0.5'
    assert_equal({**state}, second['trainer']['var_ema'])
    assert_equal({**weights('ema')[0]}, first['trainer']['var_ema'])
    with pytest.raises(ValueError, match=r'averaged as ema_0\.7, the file holds ema, ema_0\.5'):
        weights('ema_0.7')
    text = message(lambda: train_here(tmp_path / 'first', *flags, '--ema=0.9,0.5'), capsys)
    assert 'holds no weights averaged with decay 0.5: pass --ema as it was' in text


@pytest.mark.slow
def test_several_averages_go_on_exactly(train_here, tmp_path):
    flags = '--ep=1', '--ema=0.9,0.5,0.99', '--ema_warmup=0', '--save_every=2'
    whole = read(train_here(tmp_path / 'whole', *flags))
    interrupt(lambda: train_here(tmp_path / 'twice', *flags), 3)
    train_here(tmp_path / 'twice', *flags)
    assert_equal(read(tmp_path / 'twice')['trainer'], whole['trainer'])
    assert {'var_ema', 'var_ema_0.5', 'var_ema_0.99'} <= {*whole['trainer']}


@pytest.mark.slow
def test_a_tokenizer_has_several_averages(train_here, tmp_path):
    train_here(tmp_path, '--ep=1', '--ema=0.9,0.05', base=VQVAE_FLAGS)  # smaller than the warm-up's
    checkpoint = read(tmp_path, 'vae-ckpt-last.pth')
    found = [checkpoint['trainer'][key]['decoder.conv_out.weight']
             for key in ('vae_wo_ddp', 'vae_ema', 'vae_ema_0.05')]
    assert len({weight.sum().item() for weight in found}) == 3
    state, _ = tokenizer_weights(checkpoint, 'ema_0.05')
    assert torch.equal(state['decoder.conv_out.weight'], found[2])


@pytest.mark.parametrize(('flags', 'words'), [
    (['--ema=0.9,0.9'], '--ema must be one decay, or several that differ and are not 0, got 0.9,0.9'),
    (['--ema=0.9,0'], 'are not 0'), (['--ema=0.9,1'], r'--ema must be in \[0, 0.999999\], got 1'),
    (['--ema=0.9,x'], '--ema: expected numbers joined by ","'), (['--ema=x'], "got 'x'"),
    (['--ema_profiles=0.1'], '--ema_profiles and --ema_snapshot go together'),
    (['--ema_snapshot=5'], 'together'),
    (['--ema_profiles=0.1,0.10', '--ema_snapshot=5'], 'widths that differ'),
    (['--ema_profiles=0.4', '--ema_snapshot=5'], r'in \[0.005, 0.288\], got 0.4'),
    (['--model=flowar', '--ema_rate=0.9,0.9'], '--ema_rate must be one decay')])
def test_bad_averages_are_one_line(capsys, flags, words):
    with pytest.raises(SystemExit):
        parse_training(flags)
    error = capsys.readouterr().err
    assert re.search(words, error), error


@pytest.mark.parametrize('flags', [VAR_FLAGS, ['--model=npp', '--ema'], ['--model=flowar', '--ema_rate=0']])
def test_a_single_decay_is_a_number_as_before(flags):
    config = parse_training(flags)
    assert type(config.ema) is float
    assert config.ema_decays == ((config.ema,) if config.ema else ())


def test_frozen_weights_are_not_stored(data, tmp_path):
    run = prepared([f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS, f'--output_dir={tmp_path}',
                    '--freeze=trunk', *PROFILES])
    assert not [name for name in run.trainer.profiles[0].averaged_weights() if name.startswith('blocks')]
