"""Averages of the weights: several at once."""
import json
import re

import numpy as np
import pytest
import torch

import sample
from configs import parse_training
from tests.runs import VAR_FLAGS, VQVAE_FLAGS, assert_equal, interrupt, message, read
from utils.checkpoint import tokenizer_weights


def test_several_averages_are_those_of_single_ones(train_here, here, tmp_path, capsys):
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

    def images(run, weights):
        output = tmp_path / f'{run}_{weights}'
        here(sample, f'--ckpt={tmp_path / run / "ar-ckpt-last.pth"}', '--num_images=4',
             f'--weights={weights}', f'--output={output}')
        manifest = json.loads((tmp_path / f'{output.name}.json').read_text())
        return np.load(f'{output}.npz')['arr_0'], manifest
    named, manifest = images('several', 'ema_0.5')
    assert manifest['weights'] == 'ema_0.5'
    assert np.array_equal(named, images('second', 'ema')[0])
    assert not np.array_equal(named, images('several', 'ema')[0])
    with pytest.raises(SystemExit, match=r'averaged as ema_0\.7, the file holds ema, ema_0\.5'):
        images('several', 'ema_0.7')
    text = message(lambda: train_here(tmp_path / 'first', *flags, '--ema=0.9,0.5'), capsys)
    assert 'holds no weights averaged with decay 0.5: pass --ema as it was' in text


def test_several_averages_go_on_exactly(train_here, tmp_path):
    flags = '--ep=1', '--ema=0.9,0.5,0.99', '--ema_warmup=0', '--save_every=2'
    whole = read(train_here(tmp_path / 'whole', *flags))
    interrupt(lambda: train_here(tmp_path / 'twice', *flags), 3)
    train_here(tmp_path / 'twice', *flags)
    assert_equal(read(tmp_path / 'twice')['trainer'], whole['trainer'])
    assert {'var_ema', 'var_ema_0.5', 'var_ema_0.99'} <= {*whole['trainer']}


def test_a_tokenizer_has_several_averages(train_here, tmp_path):
    train_here(tmp_path, '--ep=1', '--ema=0.9,0.05', base=VQVAE_FLAGS)  # smaller than the warm-up's
    checkpoint = read(tmp_path, 'vae-ckpt-last.pth')
    found = [checkpoint['trainer'][key]['decoder.conv_out.weight']
             for key in ('vae_wo_ddp', 'vae_ema', 'vae_ema_0.05')]
    assert len({weight.sum().item() for weight in found}) == 3
    state, _ = tokenizer_weights(checkpoint, average='ema_0.05')
    assert torch.equal(state['decoder.conv_out.weight'], found[2])


@pytest.mark.parametrize(('flags', 'words'), [
    (['--ema=0.9,0.9'], '--ema must be one decay, or several that differ and are not 0, got 0.9,0.9'),
    (['--ema=0.9,0'], 'are not 0'), (['--ema=0.9,1'], r'--ema must be in \[0, 0.999999\], got 1'),
    (['--ema=0.9,x'], '--ema: expected numbers joined by ","'), (['--ema=x'], "got 'x'"),
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
