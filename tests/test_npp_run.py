"""NPP through train.py and sample.py: schedules, validation, given weights, layouts of files."""
import argparse
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import train
from configs import CONFIGS, parse_sampling, parse_training
from models import NPP, VAR, VQVAE, VQModel
from models.noise import GlobalBatch
from tests.runs import (
    BATCH,
    SIDE,
    STRIDE,
    TINY_VQVAE,
    assert_equal,
    epochs_of,
    prepared,
    read,
    same_images,
    steps_of,
    training,
)
from tests.vectors import load_json
from utils.lr_control import lr_ratio
from utils.misc import mix_seed, seed_everything

NO_DROPOUT = ('--dropout_p=0', '--token_dropout_p=0')  # a mask follows its place in the micro-batch
FROZEN = ('--lr=1e-30',)                               # every step is lost in rounding
GRID = SIDE // STRIDE


@pytest.fixture(scope='session')
def made(families):
    """(image folder, tokenizer file, tokenizer)."""
    return families['npp']


@pytest.fixture
def trained(trained_folder):
    """Folder of a training of both phases on codes, with dropout, dropped labels and averaged weights."""
    return trained_folder('npp')


def command(made, folder, *more):
    return training(made, folder, *more, model='npp')


def test_default_precision():
    assert parse_training(['--model=npp']).precision == 2


# ---------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize('row', load_json('npp/schedules')['lr_schedule'],
                         ids=lambda row: f'{row["epoch_range"]}-{row["decay_ratio"]}')
def test_published_learning_rates(row):
    """A warm-up longer than a phase has room for leaps upstream, and is refused here."""
    settings = dict(epochs=row['epochs'], patch_level=len(row['epoch_range']), epoch_rate=0.5, scheduler=True,
                    warmup=row['warmup_epochs'], decay_ratio=row['decay_ratio'], base_lr=row['base_lr'],
                    end_lr=row['end_lr'])
    bounds = np.array([0, *row['epoch_range']])
    if row['warmup_epochs'] > (1 - row['decay_ratio']) * np.diff(bounds).min():
        with pytest.raises(ValueError, match=r'^--warmup_epochs=1 does not fit .*: pass at most 0\.[58]$'):
            CONFIGS['npp'](**settings)
        return
    config, per_epoch = CONFIGS['npp'](**settings), row['steps_per_epoch']
    starts = bounds * per_epoch
    assert [end for end, _ in config.phases] == row['epoch_range'] and config.peak_lr(8) == row['base_lr']
    for step, expected in row['multiplier'].items():
        within, length = config.lr_phase(int(step), row['epochs'] * per_epoch, per_epoch)
        start = int(step) - within
        assert start in starts and start + length == starts[starts > int(step)].min()
        assert lr_ratio(config.lr_schedule, within, round(config.warmup_epochs * per_epoch), length,
                        config.warmup_start, config.final_lr_ratio(8)) == pytest.approx(expected, abs=1e-9)


def sides_of(config):
    """Side of the patches by epoch."""
    return [next(p for end, p in config.phases if epoch < end) for epoch in range(config.epochs)]


@pytest.mark.parametrize(('level', 'rate'), [(2, 0.5), (3, 0.5), (4, 0.67), (2, 0.3)])
@pytest.mark.parametrize('per_epoch', [1, 7, 5004])
def test_patches_change_at_the_very_step(level, rate, per_epoch):
    """For any number of epochs, and where `--steps` cuts the last one."""
    for epochs in range(16, 60):
        config = CONFIGS['npp'](epochs=epochs, patch_level=level, epoch_rate=rate)
        for total in {epochs * per_epoch, epochs * per_epoch - per_epoch // 2}:
            phases = config.model_kwargs(total, per_epoch)['phases']
            for epoch, side in enumerate(sides_of(config)):
                for step in {epoch * per_epoch, min((epoch + 1) * per_epoch, total) - 1}:
                    here = NPP.patch_side(SimpleNamespace(phases=phases), step / total)
                    assert here == side, (epochs, step)


@pytest.mark.parametrize(('more', 'expected'), [
    (['--epochs=4', '--patch_level=3'], [4] * 5 + [2] * 5 + [1] * 10),
    (['--steps=13'], [2] * 5 + [1] * 8)])
def test_patches_of_every_step(made, here, tmp_path, more, expected):
    here(train, *command(made, tmp_path, *more))
    assert [line['prog_patch'] for line in steps_of(tmp_path)] == expected


def test_validation_is_of_codes_in_every_phase(made, here, trained, tmp_path):
    """Of given weights it is that of the training they come from, which ended with codes."""
    here(train, *command(made, tmp_path, *FROZEN, '--eval_every=1',
                          f'--gpt_ckpt={trained / "ar-ckpt-last.pth"}'))
    patches, single = epochs_of(tmp_path)
    expected = read(trained)['run']['validation']
    assert expected['prog_patch'] == 1
    for line in (patches, single):
        assert (line['vL_mean'], line['vacc_mean']) == (expected['L_mean'], expected['acc_mean'])
    assert {line['prog_patch'] for line in steps_of(tmp_path)} == {1, 2}


# ---------------------------------------------------------------------------------------------- given weights
def test_training_begins_with_given_weights(made, codes, here, trained, tmp_path):
    """Averaged ones where the file has them; a bare file of these is the same."""
    ours, bare = trained / 'ar-ckpt-last.pth', tmp_path / 'bare.pth'
    torch.save(read(trained)['trainer']['var_ema'], bare)
    flags = (*NO_DROPOUT, '--lr=1e-3', f'--code_path={codes}')
    run = prepared(command(made, tmp_path / 'probe', *flags))
    images, labels, _ = next(run.batches)
    run.model.load_state_dict(read(trained)['trainer']['var_ema'])
    seed_everything(mix_seed(0, 0))
    with GlobalBatch(0, BATCH):
        loss, _ = run.model.train().training_loss(images, labels, 0.)
    here(train, *command(made, tmp_path / 'a', *flags, f'--gpt-ckpt={ours}'))
    here(train, *command(made, tmp_path / 'b', *flags, f'--init_from={bare}'))
    steps = steps_of(tmp_path / 'a')
    assert steps[0]['L_mean'] == pytest.approx(loss.item(), rel=1e-6) and steps == steps_of(tmp_path / 'b')
    assert abs(steps[0]['L_mean'] - math.log(300)) > 0.1, 'that of fresh weights'


def test_output_folder_comes_before_given_weights(whole_training, trained, tmp_path):
    weights = read(trained)['trainer']['var_wo_ddp']
    torch.save({name: t + 1 for name, t in weights.items()}, tmp_path / 'x.pth')
    shutil.copy(trained / 'ar-ckpt-last.pth', tmp_path)
    run = prepared(whole_training('npp', tmp_path, f'--gpt_ckpt={tmp_path / "x.pth"}'))
    assert run.start == (4, 0)
    assert_equal(dict(run.model.state_dict()), dict(weights))


@pytest.fixture(scope='module')
def var(tmp_path_factory):
    """File of another family."""
    path = tmp_path_factory.mktemp('var') / 'var.pth'
    model = VAR(VQVAE(**TINY_VQVAE), 4, patch_nums=TINY_VQVAE['v_patch_nums'], **VAR.published_sizes(1))
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize(('more', 'here_is'), [
    ('--width=128', 'dim=64 (here 128)'), ('--depth=2', 'n_layer=1 (here 2)')])
def test_weights_of_another_size_are_refused(made, stops, trained, tmp_path, more, here_is):
    ours = trained / 'ar-ckpt-last.pth'
    line = stops(train, *command(made, tmp_path / 'a', f'--gpt_ckpt={ours}', more))
    assert 'ar-ckpt-last.pth' in line and here_is in line and 'change the flags' in line, line


# ---------------------------------------------------------------------------------------------- sampling
def drawn(here, ckpt, output, *more):
    """Images by index, labels, and the manifest."""
    here(sample, '--model=npp', f'--gpt-ckpt={ckpt}', '--num-fid-samples=5', '--shuffle=-1', '--cfg-scale=3',
         f'--sample-dir={output}', *more)
    with np.load(f'{output}.npz') as file:
        return file['arr_0'], file['arr_1'], json.loads(output.with_suffix('.json').read_text())


@pytest.fixture
def ours(trained):
    return trained / 'ar-ckpt-last.pth'


def test_labels_go_round_the_classes(here, ours, tmp_path):
    _, labels, _ = drawn(here, ours, tmp_path / 'a')
    assert labels.tolist() == [0, 1, 2, 3, 0]


def test_random_labels(here, ours, tmp_path):
    """Follow from the seed, whatever the batches; image i is that of its label in a list."""
    five, labels, _ = drawn(here, ours, tmp_path / 'a', '--labels=random')
    two, same, _ = drawn(here, ours, tmp_path / 'b', '--labels=random', '--per-proc-batch-size=2')
    assert np.array_equal(labels, same) and same_images(two, five)
    np.save(tmp_path / 'labels.npy', labels)
    listed, _, _ = drawn(here, ours, tmp_path / 'c', f'--labels={tmp_path / "labels.npy"}')
    assert np.array_equal(listed, five)

    def many(seed, count=8000):
        return sample.image_labels(parse_sampling([
            '--model=npp', '--ckpt=x', '--labels=random', f'--seed={seed}', f'--num_images={count}']), 4)
    assert np.array_equal(many(0, 5), labels) and not np.array_equal(many(0), many(1))
    for counts in (np.bincount(many(0)), np.bincount(4 * many(0)[1:] + many(0)[:-1])):  # and of pairs
        assert (abs(counts - counts.mean()) < 5 * counts.mean() ** 0.5).all()


def test_sizes_of_the_images(here, stops, ours, tmp_path):
    """More codes than in training, and images that are resized after drawing."""
    plain, _, _ = drawn(here, ours, tmp_path / 'a')
    same, _, _ = drawn(here, ours, tmp_path / 'b', '--image-size=32', '--image-size-eval=32')
    assert np.array_equal(same, plain)
    large, _, _ = drawn(here, ours, tmp_path / 'c', '--image-size=48')
    assert large.shape == (5, 48, 48, 3)
    small, _, _ = drawn(here, ours, tmp_path / 'd', '--image-size=48', '--image-size-eval=24')
    assert small.shape == (5, 24, 24, 3)
    message = stops(sample, '--model=npp', f'--ckpt={ours}', '--image_size=36', f'--output={tmp_path / "e"}')
    assert 'multiples of the stride 8, got 36x36' in message and not (tmp_path / 'e.npz').exists()


def test_guided_codes(here, ours, tmp_path):
    """All of them where the interval ends after the last one."""
    def guided(*more):
        return drawn(here, ours, tmp_path / '_'.join(more), '--cfg-scale=40', *more)[0]
    everywhere = guided('--cfg-interval=-1')
    assert np.array_equal(guided(f'--cfg-interval={GRID * GRID - 2}'), everywhere)
    first_half, none = guided(f'--cfg-interval={GRID * GRID // 2}'), guided('--cfg-scale=1')
    assert not same_images(first_half, everywhere) and not same_images(first_half, none)


def test_weights_of_every_layout(made, here, trained, ours, tmp_path):
    """Published files hold neither tokenizer nor size; averaged weights come first."""
    raw, averaged = (read(trained)['trainer'][key] for key in ('var_wo_ddp', 'var_ema'))
    old = raw | dict(freqs_cis=torch.zeros(1 + GRID ** 2, 32, 2))
    vq, training_state = read(made[1].parent, made[1].name), dict(optimizer={}, steps=20)
    torch.save(dict(model=vq, discriminator={}, **training_state), tmp_path / 'vq.pt')
    torch.save(dict(state_dict=vq), tmp_path / 'vq_state.pt')
    of_average, _, manifest = drawn(here, ours, tmp_path / 'ema', '--ckpt-key=ema')
    assert manifest['weights'] == 'ema'
    of_last_step, _, manifest = drawn(here, ours, tmp_path / 'raw', '--ckpt_key=model')
    assert manifest['weights'] == 'raw' and not same_images(of_last_step, of_average)
    for i, (content, more, expected) in enumerate([
            (dict(model=raw, **training_state), (f'--vq-ckpt={made[1]}',), of_last_step),
            (dict(module=raw), (f'--vq-ckpt={tmp_path / "vq.pt"}',), of_last_step),
            (dict(state_dict=raw), (f'--vq_ckpt={tmp_path / "vq_state.pt"}',), of_last_step),
            (raw, (f'--vq_ckpt={made[1]}', '--from-fsdp'), of_last_step),
            (old, (f'--vq_ckpt={made[1]}',), of_last_step),
            (dict(model=old), (f'--vq_ckpt={made[1]}',), of_last_step),
            (dict(model=raw, ema=averaged), (f'--vq_ckpt={made[1]}',), of_average),
            (dict(model=raw, ema=averaged), (f'--vq_ckpt={made[1]}', '--ckpt_key=model'), of_last_step)]):
        torch.save(content, tmp_path / f'{i}.pt')
        again, _, _ = drawn(here, tmp_path / f'{i}.pt', tmp_path / str(i), '--image-size=32', *more)
        assert np.array_equal(again, expected), i


def test_pickled_settings_are_refused_and_the_advice_helps(made, here, stops, trained, ours, tmp_path):
    path = tmp_path / '0001500.pt'
    torch.save(dict(model=read(trained)['trainer']['var_ema'], args=argparse.Namespace(lr=1e-4)), path)
    flags = ['--image-size=32', f'--vq_ckpt={made[1]}']
    for message in (stops(sample, '--model=npp', f'--ckpt={path}', f'--output={tmp_path / "a"}', *flags),
                    stops(train, *command(made, tmp_path / 'b', f'--gpt_ckpt={path}'))):
        assert f'{str(path)!r} holds a pickled argparse.Namespace' in message
        assert "save the dict without 'args'" in message and 'weights_only=False' in message
    content = torch.load(path, weights_only=False)
    torch.save({key: value for key, value in content.items() if key != 'args'}, path)
    images, _, _ = drawn(here, path, tmp_path / 'a', *flags)
    assert np.array_equal(images, drawn(here, ours, tmp_path / 'c')[0])


def test_files_that_do_not_fit(made, stops, ours, var, tmp_path):
    """One line that says what they hold."""
    assert 'var.pth holds no NPP weights' in stops(train, *command(made, tmp_path, f'--gpt_ckpt={var}'))
    bare, other = tmp_path / 'bare.pth', tmp_path / 'other.pth'
    torch.save(read(ours.parent)['trainer']['var_ema'], bare)
    torch.save(VQModel(200, 4, net='tiny').state_dict(), other)
    for flags, words in (
            ([f'--ckpt={ours}', '--gpt_model=GPT-B'], ['GPT-B has 12 blocks of width 768, ', ' 1 of 64']),
            ([f'--ckpt={bare}'], ["bare.pth' holds a generator without its tokenizer", 'of the vq16']),
            ([f'--ckpt={bare}', f'--vq_ckpt={other}'], ['needs a tokenizer with vocab_size=300, got 200']),
            ([f'--ckpt={var}', f'--vq_ckpt={made[1]}'], ['var.pth holds no NPP weights']),
            ([f'--ckpt={ours}', f'--vq_ckpt={var}'], ['VQModel weights'])):
        line = stops(sample, '--model=npp', *flags, f'--output={tmp_path / "out"}')
        assert all(word in line for word in words), line
    assert not (tmp_path / 'out.npz').exists()
