"""Trainer: published trajectories, evaluation, accumulation, state, and its errors."""
import copy
import re

import pytest
import torch

from models import VAR
from tests.runs import assert_equal
from tests.vectors import (
    assert_within,
    frozen_vqvae,
    load_json,
    load_tensors,
    needs_rng,
    pixels,
    tiny_var,
    tiny_vqvae,
    var_state,
)
from trainer import GeneratorTrainer
from utils.amp_sc import AmpOptimizer
from utils.ema import WeightEMA
from utils.lr_control import filter_params, lr_wd_annealing

RUNS = load_json('var/trainer')['runs']


def batches():
    vectors = load_tensors('var/trainer')
    return [(pixels(vectors[f'batch.{i}.images_u8']), vectors[f'batch.{i}.labels']) for i in range(3)]


def make_trainer(model, clip=2., accumulate=1, precision=0, lr=1e-3, ema=()):
    names, params, groups = filter_params(model, model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0., fused=True)
    return GeneratorTrainer(model, AmpOptimizer(precision, optimizer, names, params, clip, accumulate), ema)


def run_trainer(run):
    schedule = run['prog'] and dict(total=run['max_it'], warmup=run['wp_it'], until=run['prog']['pg'],
                                    first_stage=run['prog']['pg0'], stage_warmup=run['prog']['prog_wp_it'])
    model = tiny_var(run['model'], drop_path_rate=run['drop_path_rate'],
                      cond_drop_rate=run['cond_drop_rate'], label_smooth=run['label_smooth'],
                      progressive=schedule)
    return make_trainer(model, run['clip'], run['ac'])


def trajectory(run, trainer):
    """Yield (row, StepInfo) for every micro-step of a stored run."""
    data = batches()
    if run['global_manual_seed'] is not None:
        torch.manual_seed(run['global_manual_seed'])
    for row in run['rows']:
        lr_wd_annealing(run['sche'], trainer.optimizer.optimizer, run['peak_lr'], run['wd'], run['wd_end'],
                        row['g_it'], run['wp_it'], run['max_it'], wp0=run['wp0'], wpe=run['wpe'])
        yield row, trainer.train_step(*data[row['batch']], progress=row['g_it'] / run['max_it'],
                                      stepping=row['stepping'])


@pytest.mark.parametrize('name', sorted(RUNS))
def test_published_trajectory(name):
    run, rtol = RUNS[name], 1e-2 if name == 'progressive' else 1e-3
    if run['global_manual_seed'] is not None:
        needs_rng()
    trainer = run_trainer(run)
    for row, info in trajectory(run, trainer):
        assert trainer.optimizer.optimizer.param_groups[0]['lr'] == pytest.approx(row['lr'], rel=1e-9)
        assert info.loss.item() == pytest.approx(row['loss'], rel=1e-3)
        if row['stepping']:
            assert info.grad_norm.item() == pytest.approx(row['grad_norm'], rel=rtol)
            values = trainer.metrics(info.aux)
            for meter, key in VAR.headline.items():
                assert values[key] == pytest.approx(row['metrics'][meter], rel=1e-3), meter
        else:
            assert info.grad_norm is None
        for key, value in row['params_l2'].items():
            assert trainer.model.get_parameter(key).norm().item() == pytest.approx(value, rel=1e-3), key
    vectors = load_tensors('var/trainer')
    for key in (key for key in vectors if key.startswith(f'{name}.')):
        final = trainer.model.get_parameter(key.removeprefix(f'{name}.')).detach()
        assert_within(final, vectors[key], atol=1e-2)
        assert ((final - vectors[key]).abs() <= 1e-4).float().mean() >= 0.99, key


@pytest.mark.parametrize('name', ['plain', 'accum'])
def test_tensorboard_values_of_the_first_step(name):
    run, trainer = RUNS[name], run_trainer(RUNS[name])
    _, info = next(trajectory(run, trainer))
    values, compared = trainer.metrics(info.aux), 0
    for entry in run['tensorboard']:
        for key in entry.keys() - {'head', 'step'}:
            assert values[key] == pytest.approx(entry[key], rel=1e-3), key
            compared += 1
    # vocabulary use thrice, loss and accuracy of four scales, the progressive state
    assert compared == 3 + 8 + 3


def test_published_evaluation():
    stored, trainer = load_json('var/trainer'), make_trainer(tiny_var('sep_l2', cond_drop_rate=0.5))
    for key, prepare in (('eval_ep_sep_l2_initial_weights', lambda t: t),
                         ('eval_ep_after_plain', after_plain)):
        trainer = prepare(trainer)
        values = trainer.eval_epoch(batches())
        for name in ('L_mean', 'L_tail', 'acc_mean', 'acc_tail'):
            assert values[name] == pytest.approx(stored[key][name], rel=1e-3), name
        assert values['count'] == stored[key]['tot']
        assert trainer.model.training


def after_plain(_):
    trainer = run_trainer(RUNS['plain'])
    list(trajectory(RUNS['plain'], trainer))
    return trainer


def test_evaluation_repeats_to_the_last_bit_and_weighs_images():
    trainer = make_trainer(tiny_var('sep_l2', cond_drop_rate=0.9, drop_path_rate=0.5))
    first = trainer.eval_epoch(batches())
    assert trainer.eval_epoch(batches()) == first
    (x, y), *rest = batches()
    uneven = [(x[:1], y[:1]), (torch.cat([x[1:], *(b[0] for b in rest)]),
                               torch.cat([y[1:], *(b[1] for b in rest)]))]
    assert trainer.eval_epoch(uneven)['L_mean'] == pytest.approx(first['L_mean'], rel=1e-5)


def test_checkpoint_tree_is_the_published_one():
    trainer = after_plain(None)
    state, expected = trainer.state_dict(), load_json('var/trainer')['trainer_state_tree']
    assert set(expected['top_keys']) <= state.keys()
    assert set(expected['config']) <= state['config'].keys()
    assert set(state['var_wo_ddp']) == set(var_state('sep_l2'))
    assert set(state['vae_local']) == set(frozen_vqvae().state_dict())
    assert list(state['var_opt']) == expected['var_opt']['keys']
    groups = state['var_opt']['optimizer']['param_groups']
    assert [(g['wd_sc'], g['lr_sc']) for g in groups] == [(0., 1.), (1., 1.)]


@pytest.mark.parametrize('accumulate', [2, 4])
def test_accumulation_equals_the_large_batch(accumulate):
    (x, y), (x2, y2), _ = batches()
    x, y = torch.cat([x, x2]), torch.cat([y, y2])
    large, small = make_trainer(tiny_var('sep_l2')), make_trainer(tiny_var('sep_l2'), accumulate=accumulate)
    for _ in range(3):
        want = large.train_step(x, y, 0.5)
        for j, rows in enumerate(torch.arange(4).chunk(accumulate)):
            got = small.train_step(x[rows], y[rows], 0.5, stepping=j + 1 == accumulate)
    assert got.grad_norm.item() == pytest.approx(want.grad_norm.item(), rel=1e-5)
    for (name, a), b in zip(large.model.named_parameters(), small.model.parameters(), strict=True):
        assert_within(b.detach(), a.detach(), atol=2e-6), name


def test_overfits_four_images():
    (x, y), (x2, y2), _ = batches()
    model = tiny_var('sep_l2')
    model.init_weights()
    trainer = make_trainer(model, lr=3e-3)
    losses = [trainer.train_step(torch.cat([x, x2]), torch.cat([y, y2]), 0.5).loss.item() for _ in range(60)]
    assert losses[0] == pytest.approx(4.56, abs=0.1)  # ln 96
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(('precision', 'ema'), [
    (0, ()), (0, (0.9,)), (0, (0.9, 0.5, 0.99)), (1, ()), (2, ())])
def test_state_round_trip_continues_bit_for_bit(precision, ema):
    data, settings = batches(), dict(precision=precision, ema=ema)
    straight = make_trainer(tiny_var('sep_l2', drop_path_rate=0.3, cond_drop_rate=0.3), **settings)
    for i in range(4):
        if i == 2:
            state = copy.deepcopy(straight.state_dict())
        torch.manual_seed(i)
        straight.train_step(*data[i % 3], progress=0.1)
    resumed = make_trainer(VAR(frozen_vqvae(), **load_json('var/var_sep_l2')['config'] | dict(
        drop_path_rate=0.3, cond_drop_rate=0.3)), **settings)
    resumed.load_state_dict(state)
    for i in (2, 3):
        torch.manual_seed(i)
        resumed.train_step(*data[i % 3], progress=0.1)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
        if ema:
            assert torch.equal(resumed.ema.weights[name], straight.ema.weights[name]), name
        for key, average in straight.more_averages.items():
            assert torch.equal(resumed.more_averages[key].weights[name], average.weights[name]), name
    assert [*straight.more_averages] == [f'var_ema_{decay}' for decay in ema[1:]]
    if ema:
        head = 'head.weight'
        assert not torch.equal(straight.ema.weights[head], straight.model.state_dict()[head])
    assert (resumed.optimizer.scaler is None) == (precision != 1)
    if precision == 1:
        assert resumed.optimizer.scaler.state_dict() == straight.optimizer.scaler.state_dict()


def test_foreign_checkpoints_are_named_in_one_line():
    trainer = make_trainer(tiny_var('sep_l2'))
    state = trainer.state_dict()
    deeper = make_trainer(VAR(frozen_vqvae(), **load_json('var/var_sep_l2')['config'] | dict(depth=3)))
    with pytest.raises(ValueError, match=r'a\.pth.*depth=2 \(here 3\)') as error:
        deeper.load_state_dict(state, 'a.pth')
    assert len(str(error.value).splitlines()) == 1
    other = {name: value + 1 if name == 'post_quant_conv.bias' else value
             for name, value in state['vae_local'].items()}
    with pytest.raises(ValueError, match='another tokenizer'):
        trainer.load_state_dict(state | dict(vae_local=other))
    with pytest.raises(ValueError, match='holds no VAR'):
        trainer.load_state_dict(dict(vae_wo_ddp=tiny_vqvae().state_dict()))
    torn = {name: value for name, value in state['var_wo_ddp'].items() if name != 'head.weight'}
    with pytest.raises(ValueError, match=r'head\.weight'):
        trainer.load_state_dict(state | dict(var_wo_ddp=torn))


def test_published_checkpoints_without_our_extras_load():
    trainer = make_trainer(tiny_var('sep_l2'))
    state = {name: value for name, value in trainer.state_dict().items() if name != 'training_state'}
    before = set(state)
    trainer.load_state_dict(state)
    assert set(state) == before


def test_losses_are_one_line_away_from_the_formula():
    """Every token weighs 1 / L, the batch is averaged: with equal tokens this is the mean cross-entropy."""
    trainer = make_trainer(tiny_var('sep_l2'))
    x, y = batches()[0]
    loss, aux = trainer.model.training_loss(x, y)
    target = torch.nn.functional.one_hot(aux['target_BL'], 96)
    teacher_BLZ = trainer.model.tokenizer.quantize.idxBl_to_var_input(trainer.model.tokenizer.encode(x))
    by_hand = -(trainer.model(y, teacher_BLZ).log_softmax(-1) * target).sum(-1).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert re.match(r'L_mean|acc_mean', next(iter(trainer.model.metrics(aux))))


@pytest.mark.slow
def test_compiled_training_equals_eager():
    """In place, same losses and same keys; without dropout, whose random stream a compiler may change."""
    data, losses = batches(), {}
    for compiled in (False, True):
        model = tiny_var('sep_l2')
        if compiled:
            model.compile()
        trainer = make_trainer(model)
        losses[compiled] = []
        for i in range(4):
            losses[compiled].append(trainer.train_step(*data[i % 3], progress=0.1).loss.item())
        assert list(trainer.state_dict()['var_wo_ddp']) == list(var_state('sep_l2'))
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_an_average_on_the_host_is_the_same_one():
    """Here both lie on the CPU, so that this shows the arithmetic and that memory is never shared."""
    data = batches()
    found = []
    for device in (None, 'cpu'):
        trainer = make_trainer(tiny_var('sep_l2'))
        trainer.ema = WeightEMA(trainer.model, 0.9, device=device)
        for i in range(3):
            trainer.train_step(*data[i], progress=0.1)
        weights = dict(trainer.model.state_dict())
        assert all(t.data_ptr() != weights[name].data_ptr() for name, t in trainer.ema.weights.items())
        found.append((trainer.ema.state_dict(), trainer.eval_epoch(data)))
    assert_equal(*found)
