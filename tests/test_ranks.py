"""The same training and the same images for any number of processes, micro-steps and images per batch."""
import json

import numpy as np
import pytest
import torch

import sample
import train
from tests.runs import (
    BATCH,
    VQVAE_FLAGS,
    WHOLE,
    assert_equal,
    largest_difference,
    launch,
    read,
    same_images,
    steps_of,
    training,
)

# Masks of dropout follow the place in the micro-batch: there is none where weights are compared. The larger
# tolerances are for AdamW, which makes a share of its step of rounding errors where gradients are tiny.
NO_DROPOUT = dict(flowar=('--attn_dropout=0', '--proj_dropout=0'),
                  npp=('--dropout_p=0', '--token_dropout_p=0'))
TOLERANCE = dict(var=1e-6, flexvar=1e-6, flowar=1e-4, npp=1e-4)
OTHER_ORDER = dict(var=1e-4, flexvar=1e-4, flowar=1e-3, npp=1e-3)  # at least, or the comparison sees nothing
SHORT = dict(var=('--ep=1',), flexvar=('--ep=2', '--ema=0.9'), flowar=('--lr=1e-3',), npp=('--lr=1e-3',))
LONG = dict(var=(), flexvar=(), flowar=WHOLE['flowar'], npp=('--epochs=4', '--scheduler', '--ema=0.9'))
MICRO_STEPS = dict(var=4, flexvar=4, flowar=4, npp=2)


@pytest.fixture(scope='session')
def commands(families, request):
    """Command lines of the trainings that are compared; NPP trains on codes, in both of its phases."""
    def command(model, folder, *more):
        on_codes = [f'--code_path={request.getfixturevalue("codes")}'] if model == 'npp' else []
        return training(families[model], folder, *NO_DROPOUT.get(model, ()), *SHORT[model], *on_codes, *more,
                        model=model)
    return command


@pytest.fixture
def whole(commands, here, tmp_path):
    """Train by one process in one step per batch; the folder."""
    def run(model, *more):
        folder = tmp_path / '_'.join((model, *more)).replace('/', '')
        here(train, *commands(model, folder, *more))
        return folder
    return run


@pytest.mark.parametrize('model', TOLERANCE)
def test_micro_steps_equal_the_large_batch(whole, model):
    """With dropped labels, drop path, mirror images and order: all follow the place in the global batch."""
    one = whole(model)
    micro = whole(model, f'--ac={MICRO_STEPS[model]}')
    assert largest_difference(read(one), read(micro)) < TOLERANCE[model]
    norms, norms_of_micro = ([line['grad_norm'] for line in steps_of(folder)] for folder in (one, micro))
    assert norms_of_micro == pytest.approx(norms, rel=1e-4 if model == 'npp' else 1e-5)
    other = whole(model, '--same_seed_for_all_ranks=1')
    assert largest_difference(read(one), read(other)) > OTHER_ORDER[model]


def test_published_batch_size_of_flowar_is_that_of_a_process(whole):
    published = whole('flowar', '--bs=2048', f'--batch_size={BATCH}')
    assert_equal(read(published)['trainer'], read(whole('flowar'))['trainer'])


@pytest.mark.parametrize('model', ['var', *(pytest.param(name, marks=pytest.mark.slow)
                                            for name in ('flexvar', 'flowar', 'npp'))])
def test_two_processes_equal_one(commands, whole, tmp_path, model):
    of_each = ['--bs=2048', f'--batch_size={BATCH // 2}'] if model == 'flowar' else []
    launch('train.py', commands(model, tmp_path / 'two', *LONG[model], *of_each), nproc=2)
    one, two = read(whole(model, *LONG[model])), read(tmp_path / 'two')
    assert one['epoch'] == two['epoch'] > 0
    assert largest_difference(one, two) < TOLERANCE[model]
    expected, validation = (checkpoint['run']['validation'] for checkpoint in (one, two))
    assert validation['count'] == expected['count'] == 8
    if model != 'flowar':  # whose times and noise are drawn anew by each process
        assert validation == pytest.approx(expected, rel=1e-4)


def test_codebook_is_equal_on_two_processes(data, tmp_path, train_here):
    flags = [*VQVAE_FLAGS, '--ep=1', '--defer=2']
    launch('train.py', [f'--data_path={data[0]}', f'--output_dir={tmp_path / "2"}', *flags], nproc=2)
    train_here(tmp_path / '1', base=flags)
    one, two = (read(tmp_path / name, 'vae-ckpt-last.pth')['trainer']['vae_wo_ddp'] for name in '12')
    for name in ('quantize.embedding.weight', 'quantize.ema_vocab_hit_SV', 'encoder.conv_in.weight'):
        assert (one[name] - two[name]).abs().max() < 1e-5, name


# ---------------------------------------------------------------------------------------------- sampling
OPTIONS = dict(flexvar=['--top_k=20', '--cfg=2.5', '--maxpn=16', '--depth=1'],
               flowar=['--cfg=3', '--num_step=6'], npp=['--cfg=3'])
PIXELS = dict(flexvar=48, flowar=32, npp=32)


@pytest.fixture
def draw(here, trained_folder, tmp_path):
    """Five images of a trained model by index, and the manifest."""
    def run(model, *more):
        output = tmp_path / '_'.join((model, *more))
        here(sample, f'--model={model}', f'--ckpt={trained_folder(model) / "ar-ckpt-last.pth"}',
             '--num_images=5', '--shuffle=-1', *OPTIONS[model], f'--output={output}', *more)
        return np.load(f'{output}.npz')['arr_0'], json.loads(output.with_suffix('.json').read_text())
    return run


@pytest.mark.parametrize('model', OPTIONS)
def test_images_do_not_depend_on_the_batch(draw, model):
    """Averaged weights are drawn from, at the size of the training."""
    five, manifest = draw(model)
    assert five.shape == (5, PIXELS[model], PIXELS[model], 3)
    assert len(np.unique(five.reshape(5, -1), axis=0)) == 5
    assert manifest['weights'] == 'ema'
    two, manifest = draw(model, '--batch_size=2')
    assert manifest['batch_size'] == 2
    assert same_images(two, five)


@pytest.mark.slow
@pytest.mark.parametrize('model', OPTIONS)
def test_images_do_not_depend_on_the_processes(draw, trained_folder, tmp_path, model):
    draw(model, '--bs=2')
    flags = [f'--model={model}', f'--ckpt={trained_folder(model) / "ar-ckpt-last.pth"}', '--num_images=5',
             '--shuffle=-1', *OPTIONS[model], '--bs=2']
    launch('sample.py', [*flags, f'--output={tmp_path / "two"}'], nproc=2)
    assert (tmp_path / f'{model}_--bs=2.npz').read_bytes() == (tmp_path / 'two.npz').read_bytes()


# ---------------------------------------------------------------------------------------------- precision
PRECISIONS = [('flowar', '--fp16=1'), ('flowar', '--fp16=2'), ('npp', '--mixed_precision=bf16')]


@pytest.mark.parametrize(('model', 'flag'), PRECISIONS)
def test_half_precision_learns_the_same(whole_training, trained_folder, here, tmp_path, model, flag):
    """bfloat16 keeps 8 bits, so sums of many products agree to some percent."""
    here(train, *whole_training(model, tmp_path, flag))
    half, single = read(tmp_path), read(trained_folder(model))
    assert ('scaler' in half['trainer']['var_opt']) == (flag == '--fp16=1')
    weights, expected = (checkpoint['trainer']['var_wo_ddp'] for checkpoint in (half, single))
    assert not all(torch.equal(t, expected[name]) for name, t in weights.items())
    for line, other in zip(steps_of(tmp_path), steps_of(trained_folder(model)), strict=True):
        assert line['L_mean'] == pytest.approx(other['L_mean'], rel=0.03)
