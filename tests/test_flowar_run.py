"""FlowAR through train.py and sample.py: validation, steps of the flow head, layouts of files."""
import json

import numpy as np
import pytest
import torch

import sample
import train
from configs import parse_training
from models import VAR, VQVAE, AutoencoderKL
from tests.runs import BATCH, TINY_VQVAE, assert_equal, epochs_of, read, same_images, steps_of, training

FROZEN = ('--lr=1e-30', '--min_lr=0', '--twd=0')  # every step is lost in rounding


@pytest.fixture(scope='session')
def made(families):
    """(image folder, tokenizer file, tokenizer)."""
    return families['flowar']


@pytest.fixture
def trained(trained_folder):
    """Folder of a training of two epochs with dropout, dropped labels and averaged weights."""
    return trained_folder('flowar')


# ---------------------------------------------------------------------------------------------- training
def test_published_batch_size_suits_any_number_of_ranks():
    config = parse_training(['--model=flowar', '--batch_size=64'])
    config.check_batch(3)
    assert config.micro_batch(3) == 192


def test_gradient_checkpointing_gives_the_same_weights(whole_training, here, trained, tmp_path):
    here(train, *whole_training('flowar', tmp_path, '--use_checkpoint'))
    assert_equal(read(tmp_path)['trainer'], read(trained)['trainer'])


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
    first, second = epochs_of(tmp_path)
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


# ---------------------------------------------------------------------------------------------- sampling
def drawn(here, ckpt, output, *more):
    """Images by index, and the manifest."""
    here(sample, '--model=flowar', f'--ckpt={ckpt}', '--num_images=5', '--shuffle=-1', '--cfg=3',
         '--num_step=6', f'--output={output}', *more)
    return np.load(f'{output}.npz')['arr_0'], json.loads(output.with_suffix('.json').read_text())


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


def test_files_of_other_models(here, trained, var, tmp_path):
    """One line that names the file and what it should hold."""
    ours, output = trained / 'ar-ckpt-last.pth', tmp_path / 'a'
    torch.save(AutoencoderKL(8, net='tiny').state_dict(), tmp_path / 'kl8.pth')
    torch.save(read(trained)['trainer']['var_ema'], tmp_path / 'flat.pth')
    for flags, message in (
            ((var[0],), r'^sample: .*ar-ckpt-last\.pth holds no FlowAR weights.*: pass a checkpoint of that'),
            ((tmp_path / 'flat.pth',), r'flat\.pth. holds a generator without its tokenizer: pass the file'),
            ((ours, f'--vae_path={var[1]}'), r'ar-ckpt-last\.pth (holds no|does not fit) AutoencoderKL'),
            ((ours, f'--vae_path={tmp_path / "kl8.pth"}'), 'needs a tokenizer with channels=4, got 8: pass')):
        with pytest.raises(SystemExit, match=message):
            drawn(here, flags[0], output, *flags[1:])
    assert not output.with_suffix('.npz').exists()


