"""Weights that are spread over ranks (FSDP2) train, evaluate and save as those that every rank has."""
import math

import pytest
import torch

import dist
import train
from configs.var import VARConfig
from tests.runs import STEPS_PER_EPOCH, launch, read, steps_of, training
from tests.test_ranks import NO_DROPOUT
from utils.sharding import device_mesh

# A rate that does not depend on the length of the training, so that an epoch can be done by another command.
STEADY = dict(
    var=('--sche=flat', '--wp=0.5', '--ema=0.9'),
    flexvar=('--sche=flat', '--wp=0.5', '--ema=0.9'),
    flowar=('--lr_schedule=constant', '--lr=1e-3', '--ema_rate=0.9'),
    npp=('--lr=1e-3', '--ema=0.9', '--patch_level=1'),
)
# AdamW makes a share of its step of rounding errors where gradients are tiny.
ANY_RANKS = 1e-5
EPOCHS = dict(var='ep', flexvar='ep', flowar='ep', npp='epochs')
ANY_FAMILY = ['var', *(pytest.param(name, marks=pytest.mark.slow) for name in ('flexvar', 'flowar', 'npp'))]


@pytest.fixture
def command(families):
    """Command lines of trainings with averaged weights up to an epoch."""
    def flags(model, folder, epochs, *more):
        return training(families[model], folder, *NO_DROPOUT.get(model, ()), *STEADY[model],
                        f'--{EPOCHS[model]}={epochs}', *more, model=model)
    return flags


def relative_difference(a, b):
    """Norm of the difference of two trees of tensors over the norm of the second one."""
    squares = difference = 0.
    others = dict(tensors_of(a))
    for name, value in tensors_of(b):
        other = others.pop(name)
        assert other.shape == value.shape and other.dtype == value.dtype, name
        if value.is_floating_point() and value.isfinite().all():  # masks hold -inf
            squares += value.double().square().sum().item()
            difference += (other.double() - value).square().sum().item()
        else:
            assert torch.equal(other, value), name
    assert not others
    return math.sqrt(difference / squares)


def tensors_of(tree, name=''):
    if isinstance(tree, torch.Tensor):
        yield name, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from tensors_of(value, f'{name}.{key}')


def assert_same_training(folder, other, model, tolerance):
    """Weights, moments, averages, norms of gradients and scores of two folders agree."""
    trainer, expected = read(folder)['trainer'], read(other)['trainer']
    assert trainer.keys() == expected.keys()
    for key in ('var_wo_ddp', 'var_ema', 'var_opt'):
        assert relative_difference(trainer[key], expected[key]) < tolerance, key
    norms, expected_norms = ([line['grad_norm'] for line in steps_of(path)] for path in (folder, other))
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    scores, expected_scores = (read(path)['run']['validation'] for path in (folder, other))
    if model != 'flowar':  # whose times and noise are drawn anew by each process
        assert scores == pytest.approx(expected_scores, rel=1e-4)


@pytest.mark.parametrize('model', ANY_FAMILY)
def test_sharded_training_continues_in_one_process(command, here, tmp_path, model):
    """With micro-steps and averages; all of it equals a training by one process alone."""
    micro = [] if model == 'npp' else ['--ac=2']
    of_each = ['--bs=2048', '--batch_size=2'] if model == 'flowar' else []
    run = launch('train.py', command(model, tmp_path / 'run', 1, '--shard=1', *micro, *of_each), nproc=2)
    assert 'each of 1 copies of the weights is spread over 2 ranks' in run.stdout + run.stderr
    assert read(tmp_path / 'run')['epoch'] == 1
    here(train, *command(model, tmp_path / 'run', 2))
    here(train, *command(model, tmp_path / 'one', 2))
    assert_same_training(tmp_path / 'run', tmp_path / 'one', model, ANY_RANKS)
    assert len(steps_of(tmp_path / 'run')) == 2 * STEPS_PER_EPOCH


@pytest.mark.slow
@pytest.mark.parametrize('model', EPOCHS)
def test_sharded_training_equals_copies_on_all_ranks(command, tmp_path, model):
    """It also continues a training of copies, and copies continue it."""
    of_each = ['--bs=2048', '--batch_size=4'] if model == 'flowar' else []
    for epochs, shard in ((1, 0), (2, 1), (3, 0)):
        launch('train.py', command(model, tmp_path / 'run', epochs, f'--shard={shard}', *of_each), nproc=2)
    launch('train.py', command(model, tmp_path / 'copies', 3, *of_each), nproc=2)
    launch('train.py', command(model, tmp_path / 'sharded', 3, '--shard=1', *of_each), nproc=2)
    assert_same_training(tmp_path / 'run', tmp_path / 'copies', model, 1e-6)
    assert_same_training(tmp_path / 'sharded', tmp_path / 'copies', model, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('more', [
    ('--fp16=1',),                        # with loss scaling
    ('--fp16=2', '--act_ckpt=block'),
    ('--act_ckpt=attention', '--tfast=3'),
    ('--fid_images=9', '--fid_features=digits', '--eval_every=1'),
], ids=' '.join)
def test_sharded_training_with_other_settings(command, tmp_path, more):
    for name, shard in (('sharded', 1), ('copies', 0)):
        launch('train.py', command('var', tmp_path / name, 2, f'--shard={shard}', *more), nproc=2)
    sharded, copies = (read(tmp_path / name)['trainer'] for name in ('sharded', 'copies'))
    tolerance = 1e-2 if '--fp16=2' in more else 1e-6
    assert relative_difference(sharded['var_wo_ddp'], copies['var_wo_ddp']) < tolerance


@pytest.mark.slow
def test_groups_of_ranks_share_a_copy(command, here, tmp_path):
    """Four ranks in two groups; weights of both groups are compared at every checkpoint."""
    flags = command('var', tmp_path / 'four', 1, '--shard=1', '--shard_group=2', '--save_every=2')
    run = launch('train.py', flags, nproc=4)
    assert 'each of 2 copies of the weights is spread over 2 ranks' in run.stdout + run.stderr
    here(train, *command('var', tmp_path / 'one', 1))
    assert_same_training(tmp_path / 'four', tmp_path / 'one', 'var', ANY_RANKS)


def test_groups_must_divide_the_ranks(monkeypatch):
    monkeypatch.setattr(dist, 'get_world_size', lambda: 8)
    with pytest.raises(ValueError, match='--shard_group=3 does not divide the 8 ranks: pass the number'):
        device_mesh('cpu', 3)
    with pytest.raises(ValueError, match='--shard_group goes with --shard=1'):
        VARConfig(shard_group=8)
    with pytest.raises(ValueError, match='run python export'):
        VARConfig(shard=True, export=True)
