"""FlowAR through train.py, extract.py and sample.py: exact resume, micro-steps, validation, wrong files."""
import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch

import extract
import sample
import train
from configs import parse_recipe
from evaluation import digits_features as digits
from models import VAR, VQVAE, AutoencoderKL
from tests import test_token_cache
from tests.runs import BATCH, TINY_VQVAE, launch, prepared, read
from tests.test_run import Interrupt, assert_equal, epoch_lines, largest_difference, same_weights
from tests.test_sample import same_images
from tests.test_token_cache import training

made = test_token_cache.made
TWO_EPOCHS = ('--ep=2', '--lr=1e-3', '--ema_rate=0.9')
NO_DROPOUT = ('--attn_dropout=0', '--proj_dropout=0')  # a mask follows its place in the micro-batch
FROZEN = ('--lr=1e-30', '--min_lr=0', '--twd=0')       # every step is lost in rounding


@pytest.fixture(scope='module')
def trained(made, tmp_path_factory):
    """Folder of a training of two epochs with dropout, dropped labels and averaged weights."""
    folder = tmp_path_factory.mktemp('trained')
    train.train(prepared(training(made, folder, *TWO_EPOCHS)))
    return folder


def steps_of(folder):
    return [json.loads(line) for line in (folder / 'steps.jsonl').read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize('cached', [False, True])
def test_resume_is_exact(made, here, trained, tmp_path, monkeypatch, cached):
    """Within an epoch: masks, dropped labels, mirror images, latents, times and noise go on as they would."""
    more, straight = TWO_EPOCHS, trained
    if cached:
        here(extract, *test_token_cache.flags(made, tmp_path / 'cache'))
        more, straight = (*more, f'--cached_path={tmp_path / "cache"}'), tmp_path / 'straight'
        here(train, *training(made, straight, *more))
    step, arguments = train.Run.train_step, training(made, tmp_path / 'a', *more, '--save_every=3')

    def interrupted(self, images, labels, number):
        if number == 7:
            raise Interrupt
        return step(self, images, labels, number)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(train.Run, 'train_step', interrupted)
        here(train, *arguments)
    assert read(tmp_path / 'a')['iter'] == 1
    here(train, *arguments)
    final, expected = read(tmp_path / 'a'), read(straight)
    assert_equal(final['trainer'], expected['trainer'])
    assert final['run'] == expected['run']
    assert not same_weights(final, dict(trainer=dict(var_wo_ddp=final['trainer']['var_ema'])))


def test_micro_steps_and_the_published_batch_size(made, here, tmp_path):
    """Equal up to the order of sums, of which AdamW makes a share of its step where gradients are tiny."""
    def one_epoch(name, *more):
        here(train, *training(made, tmp_path / name, *NO_DROPOUT, '--lr=1e-3', *more))
        return read(tmp_path / name), [line['grad_norm'] for line in steps_of(tmp_path / name)]
    whole, norms = one_epoch('whole')
    micro, norms_of_micro = one_epoch('micro', '--ac=4')
    assert norms_of_micro == pytest.approx(norms, rel=1e-5) and largest_difference(micro, whole) < 1e-4
    published, _ = one_epoch('published', '--bs=2048', f'--batch_size={BATCH}')
    assert_equal(published['trainer'], whole['trainer'])
    other, _ = one_epoch('other', '--same_seed_for_all_ranks=1')
    assert largest_difference(other, whole) > 1e-3, 'the comparison would notice another order'


def test_published_batch_size_suits_any_number_of_ranks():
    recipe = parse_recipe(['--model=flowar', '--batch_size=64'])
    recipe.check_batch(3)
    assert recipe.micro_batch(3) == 192


@pytest.mark.slow
def test_two_ranks_equal_one(made, here, tmp_path):
    """`--batch_size` is of each."""
    more = (*NO_DROPOUT, *TWO_EPOCHS)
    here(train, *training(made, tmp_path / 'one', *more))
    launch('train.py', training(made, tmp_path / 'two', *more, '--bs=2048', f'--batch_size={BATCH // 2}'), 2)
    one, two = read(tmp_path / 'one'), read(tmp_path / 'two')
    assert largest_difference(one, two) < 1e-4, 'see the micro-steps'
    assert two['run']['validation']['count'] == one['run']['validation']['count'] == 8


def test_gradient_checkpointing_gives_the_same_weights(made, here, trained, tmp_path):
    here(train, *training(made, tmp_path, *TWO_EPOCHS, '--use_checkpoint'))
    assert_equal(read(tmp_path)['trainer'], read(trained)['trainer'])


@pytest.mark.parametrize('precision', [1, 2])
def test_half_precision_learns_the_same(made, here, trained, tmp_path, precision):
    """bfloat16 keeps 8 bits, so sums of many products agree to some percent."""
    here(train, *training(made, tmp_path, *TWO_EPOCHS, f'--fp16={precision}'))
    half, single = read(tmp_path), read(trained)
    assert ('scaler' in half['trainer']['var_opt']) == (precision == 1)
    assert not same_weights(half, single)
    for line, expected in zip(steps_of(tmp_path), steps_of(trained), strict=True):
        assert line['L_mean'] == pytest.approx(expected['L_mean'], rel=0.03)


@pytest.mark.parametrize(('precision', 'batch'), [(0, BATCH), (1, 2), (0, 2)])
def test_overflow_stops_with_a_line_and_keeps_a_good_checkpoint(made, here, tmp_path, precision, batch):
    """Steps that are not finite are left out until there are too many in a row."""
    line = r'^train: the last \d+ steps up to step \d+ were not finite: .*lower'
    with pytest.raises(SystemExit, match=line):
        here(train, *training(made, tmp_path, f'--fp16={precision}', f'--bs={batch}', '--lr=1e12',
                              '--grad_clip=0', '--save_every=1'))
    weights = read(tmp_path)['trainer']['var_wo_ddp']
    assert all(t.isfinite().all() for name, t in weights.items() if name != 'mask')


# ---------------------------------------------------------------------------------------------- validation
def test_validation_of_the_same_weights_repeats(made, here, tmp_path):
    """Whatever training drew in between."""
    here(train, *training(made, tmp_path, *FROZEN, '--ep=2', '--eval_every=1'))
    first, second = epoch_lines(tmp_path)
    assert first['vL_mean'] == second['vL_mean'] and first['vL_tail'] == second['vL_tail']
    assert first['L_mean'] != second['L_mean'], 'training draws anew'


def test_weighting_of_times_is_no_part_of_the_metrics(made, here, tmp_path):
    for name in ('uniform', 'debiased'):
        here(train, *training(made, tmp_path / name, *FROZEN, f'--loss_weighting={name}'))
    uniform, debiased = (tmp_path / name for name in ('uniform', 'debiased'))
    assert read(uniform)['run']['validation'] == read(debiased)['run']['validation']
    for ours, theirs in zip(steps_of(uniform), steps_of(debiased), strict=True):
        assert ours.pop('grad_norm') != theirs.pop('grad_norm')
        assert ours == theirs


@pytest.fixture
def random_features(monkeypatch):
    """In the place of fitted ones, which take seconds."""
    rng = np.random.RandomState(0)
    monkeypatch.setattr(digits, '_fit', lambda sizes: [
        array for inputs, outputs in pairwise((digits.SIDE ** 2, *sizes, 10))
        for array in (rng.randn(outputs, inputs) / inputs ** 0.5, np.zeros(outputs))])


def test_distance_during_training_changes_nothing(made, here, trained, tmp_path, random_features):
    here(train, *training(made, tmp_path, *TWO_EPOCHS, '--fid_images=8', '--fid_features=digits',
                          '--fid_flags=--cfg=2 --flow_upper_steps=8 --flow_lower_steps=4 --eval_bsz=3'))
    curve = [line['fid_0.008k'] for line in epoch_lines(tmp_path) if 'fid_0.008k' in line]
    assert len(curve) == 1 and 0 < curve[0] < math.inf
    assert_equal(read(tmp_path)['trainer'], read(trained)['trainer'])


def test_tokens_are_no_reference_of_distances(made, here, tmp_path, random_features):
    for split in ('train', 'val'):
        here(extract, *test_token_cache.flags(made, tmp_path / split, f'--split={split}'))
    cached = f'--cached_path={tmp_path / "train"}', f'--cached_val_path={tmp_path / "val"}'
    with pytest.raises(SystemExit, match=r'^train: .*--cached_val_path.*--fid_ref'):
        here(train, *training(made, tmp_path / 'a', *cached, '--fid_images=4', '--fid_features=digits'))


# ---------------------------------------------------------------------------------------------- sampling
def drawn(here, ckpt, output, *more):
    """Images by index, and the manifest."""
    here(sample, '--model=flowar', f'--ckpt={ckpt}', '--num_images=5', '--shuffle=-1', '--cfg=3',
         '--num_step=6', f'--output={output}', *more)
    return np.load(f'{output}.npz')['arr_0'], json.loads(output.with_suffix('.json').read_text())


def test_images_do_not_depend_on_the_batch(here, trained, tmp_path):
    five, _ = drawn(here, trained / 'ar-ckpt-last.pth', tmp_path / 'a')
    assert five.shape == (5, 32, 32, 3) and len(np.unique(five.reshape(5, -1), axis=0)) == 5
    two, manifest = drawn(here, trained / 'ar-ckpt-last.pth', tmp_path / 'b', '--eval_bsz=2')
    assert manifest['batch_size'] == 2 and same_images(two, five)


@pytest.mark.slow
def test_images_do_not_depend_on_ranks(here, trained, tmp_path):
    flags = ['--model=flowar', f'--ckpt={trained / "ar-ckpt-last.pth"}', '--num_images=5', '--eval_bsz=2',
             '--num_step=6']
    here(sample, *flags, f'--output={tmp_path / "one"}')
    launch('sample.py', [*flags, f'--output={tmp_path / "two"}'], nproc=2)
    assert (tmp_path / 'one.npz').read_bytes() == (tmp_path / 'two.npz').read_bytes()


def test_annealed_steps(here, trained, tmp_path):
    """From one number to the same number they are plain sampling; fewer at the end are other images."""
    ckpt = trained / 'ar-ckpt-last.pth'
    plain, _ = drawn(here, ckpt, tmp_path / 'a')
    same, _ = drawn(here, ckpt, tmp_path / 'b', '--num_step=25', '--flow_upper_steps=6',
                    '--flow_lower_steps=6')
    assert np.array_equal(same, plain)
    for upper, lower in ((6, 2), (12, 6)):
        annealed, manifest = drawn(here, ckpt, tmp_path / f'{upper}', f'--flow_upper_steps={upper}',
                                   f'--flow_lower_steps={lower}')
        assert not same_images(annealed, plain)
        assert [manifest['settings'][f'flow_{end}_steps'] for end in ('upper', 'lower')] == [upper, lower]


def test_weights_of_every_layout(made, here, trained, tmp_path):
    """Averaged weights are drawn from where there are any; published files hold no tokenizer."""
    ours, tokenizer = trained / 'ar-ckpt-last.pth', f'--vae_path={made[1]}'
    raw, averaged = (read(trained)['trainer'][key] for key in ('var_wo_ddp', 'var_ema'))
    torch.save(averaged, tmp_path / 'flat.pth')
    torch.save(dict(model=raw, model_ema=averaged, optimizer={}, epoch=1), tmp_path / 'published.pth')
    expected, manifest = drawn(here, ours, tmp_path / 'ema')
    assert manifest['weights'] == 'ema'
    of_last_step, manifest = drawn(here, ours, tmp_path / 'raw', '--weights=raw')
    assert manifest['weights'] == 'raw' and not same_images(of_last_step, expected)
    for name, more, images in (('flat', (), expected), ('published', (), expected),
                               ('published', ('--weights=raw',), of_last_step)):
        again, _ = drawn(here, tmp_path / f'{name}.pth', tmp_path / f'{name}{len(more)}', tokenizer, *more)
        assert np.array_equal(again, images), (name, more)


def test_published_checkpoint_draws_raw_and_averaged_weights_apart(made, here, trained, tmp_path):
    """The manifest tells them apart, and so does a folder that is complete."""
    raw, averaged = (read(trained)['trainer'][key] for key in ('var_wo_ddp', 'var_ema'))
    torch.save(dict(model=raw, model_ema=averaged), tmp_path / 'file.pth')
    tokenizer = f'--vae_path={made[1]}'
    assert drawn(here, tmp_path / 'file.pth', tmp_path / 'a', tokenizer)[1]['weights'] == 'ema'
    with pytest.raises(SystemExit, match='was begun with other settings or weights'):
        drawn(here, tmp_path / 'file.pth', tmp_path / 'a', tokenizer, '--weights=raw')


# ---------------------------------------------------------------------------------------------- bad files
@pytest.fixture(scope='module')
def var(tmp_path_factory):
    """(file of a VAR training, file of its VQVAE)."""
    folder = tmp_path_factory.mktemp('var')
    vae = VQVAE(**TINY_VQVAE)
    model = VAR(vae, num_classes=4, patch_nums=TINY_VQVAE['v_patch_nums'], **VAR.published_sizes(1))
    trainer = dict(var_wo_ddp=model.state_dict(), vae_local=vae.state_dict(), vae_config=vae.config_state(1.))
    torch.save(dict(epoch=1, iter=0, trainer=trainer, args=dict(model='var')), folder / 'ar-ckpt-last.pth')
    torch.save(vae.state_dict(), folder / 'vqvae.pth')
    return folder / 'ar-ckpt-last.pth', folder / 'vqvae.pth'


@pytest.mark.parametrize(('more', 'message'), [
    (['--img_size=64'], r'ar-ckpt-last.pth is a FlowAR with scale=\(1, 2, 4\) \(here \(1, 2, 4, 8\)\): ch'),
    (['--size=large'], r'cross=False \(here True\): change the flags'),
    (['--ema_rate=0.9', '--seed=1'], 'begun with seed 0, got --seed=1'),
])
def test_other_flags_on_resume(made, here, trained, tmp_path, more, message):
    shutil.copy(trained / 'ar-ckpt-last.pth', tmp_path)
    with pytest.raises(SystemExit, match=message):
        here(train, *training(made, tmp_path, *more))
    assert (tmp_path / 'ar-ckpt-last.pth').read_bytes() == (trained / 'ar-ckpt-last.pth').read_bytes()


def test_files_of_other_models(made, here, trained, var, tmp_path):
    """One line that names the file and what it should hold."""
    ours, output = trained / 'ar-ckpt-last.pth', tmp_path / 'a'
    shutil.copy(var[0], tmp_path / 'ar-ckpt-last.pth')
    with pytest.raises(SystemExit, match='was trained with --model=var, got --model=flowar: correct it'):
        here(train, *training(made, tmp_path))
    torch.save(AutoencoderKL(8, net='tiny').state_dict(), tmp_path / 'kl8.pth')
    torch.save(read(trained)['trainer']['var_ema'], tmp_path / 'flat.pth')
    for flags, message in (
            ((var[0],), r'^sample: .*ar-ckpt-last\.pth holds no FlowAR weights.*: pass a checkpoint of that'),
            ((tmp_path / 'flat.pth',), r'the tokenizer of .*flat\.pth holds no AutoencoderKL weights'),
            ((ours, f'--vae_path={var[1]}'), r'ar-ckpt-last\.pth (holds no|does not fit) AutoencoderKL'),
            ((ours, f'--vae_path={tmp_path / "kl8.pth"}'), 'needs a tokenizer with channels=4, got 8: pass')):
        with pytest.raises(SystemExit, match=message):
            drawn(here, flags[0], output, *flags[1:])
    assert not output.with_suffix('.npz').exists()


@pytest.mark.parametrize('index', [0, 1])
def test_tokenizer_of_var_is_refused(made, here, var, tmp_path, index):
    """Bare or inside a checkpoint of VAR; its convolutions have the keys of a KL-16."""
    with pytest.raises(SystemExit, match=r'\.pth (holds no|does not fit) AutoencoderKL') as stop:
        here(train, *training(made, tmp_path, f'--vae_path={var[index]}'))
    assert len(str(stop.value).splitlines()) == 1
