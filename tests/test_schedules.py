"""Learning rate, weight decay, parameter groups, precision rules and meters."""
import math

import pytest
import torch
from torch import nn

from tests.vectors import load_json, tiny_var
from utils import log
from utils.amp_sc import AmpOptimizer
from utils.log import MetricLogger, SmoothedValue
from utils.lr_control import filter_params, lr_ratio, lr_wd_annealing


@pytest.mark.parametrize('table', load_json('var/schedules')['tables'],
                         ids=lambda t: f'{t["sche"]}-{t["wp_it"]}-{t["max_it"]}')
def test_schedule_tables(table):
    groups = [dict(params=[nn.Parameter(torch.zeros(1))], lr_sc=lr, wd_sc=wd)
              for lr, wd in ((1, 0), (1, 1), (.25, .5))]
    optimizer = torch.optim.AdamW(groups)
    args = [table[name] for name in ('peak_lr', 'wd', 'wd_end')]
    for cur_it, *expected in table['rows']:
        values = lr_wd_annealing(table['sche'], optimizer, *args, cur_it, table['wp_it'], table['max_it'],
                                 wp0=table['wp0'], wpe=table['wpe'])
        assert values == pytest.approx(expected, rel=1e-9)
    assert optimizer.param_groups[2]['lr'] == optimizer.param_groups[1]['lr'] * 0.25


def test_schedules_survive_tiny_runs_and_refuse_unknown_names():
    for schedule in ('cos', 'lin', 'lin0', 'lin00', 'lin0.8', 'lin1', 'exp'):
        for total, warmup in ((1, 0), (2, 1), (3, 3)):
            assert all(0 < lr_ratio(schedule, step, warmup, total, 0.005, 0.01) <= 1 for step in range(total))
    with pytest.raises(NotImplementedError, match='step'):
        lr_ratio('step', 5, 0, 10, 0.005, 0.01)


@pytest.mark.parametrize('variant', ['sep_l2', 'shared_nol2', 'sep_nol2', 'shared_l2'])
def test_parameter_groups(variant):
    expected, model = load_json('var/param_groups'), tiny_var(variant)
    assert model.no_weight_decay() == set(expected['nowd_keys'])
    names, params, groups = filter_params(model, model.no_weight_decay())
    by_id = {id(p): n for n, p in model.named_parameters()}
    want = expected['models'][variant]
    assert names == want['names'] and [by_id[id(p)] for p in params] == names
    assert len(groups) == len(want['groups'])
    for group, wanted in zip(groups, want['groups'], strict=True):
        assert (group['wd_sc'], group['lr_sc']) == (wanted['wd_sc'], wanted['lr_sc'])
        assert [by_id[id(p)] for p in group['params']] == wanted['params']


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert filter_params(model)[0] == ['weight']


# ---------------------------------------------------------------------------------------------- AmpOptimizer
def tiny(mixed_precision, clip=1., accumulate=1):
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.1)
    return param, AmpOptimizer(mixed_precision, optimizer, ['p'], [param], clip, accumulate)


@pytest.mark.parametrize(('clip', 'expected'), [(1., 1.), (0., 5.), (-1., 5.), (10., 5.)])
def test_norm_is_reported_before_clipping(clip, expected):
    param, amp = tiny(0, clip)
    norm, scale = amp.backward_clip_step(True, (param * torch.tensor([3., 4., 0.])).sum())
    assert norm.item() == pytest.approx(5) and scale is None
    assert (1 - param).norm().item() == pytest.approx(0.1 * expected, rel=1e-4)
    assert param.grad is None


def test_micro_steps_accumulate_and_do_not_move():
    param, amp = tiny(0, clip=0, accumulate=2)
    assert amp.backward_clip_step(False, param.sum()) == (None, None)
    assert torch.equal(param.data, torch.ones(3))
    norm, _ = amp.backward_clip_step(True, 3 * param.sum())
    assert norm.item() == pytest.approx(2 * 3 ** 0.5)


def test_float16_scaler_rules():
    param, amp = tiny(1, clip=0)
    assert amp.backward_clip_step(True, param.sum())[1] == 11
    before = param.data.clone()
    amp.backward_clip_step(True, (param * math.inf).sum())  # an overflow is skipped and halves the scale
    assert torch.equal(param.data, before) and amp.scaler.get_scale() == 2 ** 10
    amp.scaler.update(65536.)
    assert amp.backward_clip_step(True, param.sum())[1] == 16  # read before it is cut back
    assert amp.scaler.get_scale() == 32768
    assert amp.state_dict().keys() == {'optimizer', 'scaler'}


@pytest.mark.parametrize(('precision', 'dtype'), [(0, torch.float32), (1, torch.float16),
                                                  (2, torch.bfloat16)])
def test_autocast_follows_the_config(precision, dtype):
    _, amp = tiny(precision)
    with amp.amp_ctx:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


# ---------------------------------------------------------------------------------------------- meters
@pytest.mark.parametrize('case', load_json('var/metrics')['log_iters'])
def test_logging_iterations(case):
    meters = MetricLogger()
    next(meters.log_every(case['start_it'], case['max_iters'], iter(range(10 ** 6)), case['count']))
    assert sorted(meters.log_iters) == case['log_iters']


@pytest.mark.parametrize('case', load_json('var/metrics')['smoothed'])
def test_smoothed_value(case):
    meter = SmoothedValue(window_size=case['window'])
    for value in case['values']:
        meter.update(value)
    for name in ('median', 'avg', 'global_avg', 'max', 'value', 'count', 'total'):
        assert getattr(meter, name) == pytest.approx(case[name], rel=1e-9), name
    assert str(meter) == case['text']


def test_progress_line_has_eta_speed_and_shares(caplog):
    meters = MetricLogger()
    with caplog.at_level('INFO'):
        for _ in meters.log_every(1, 4, iter('abc'), 2, header='[Ep]: [   0/9]', images_per_iter=8,
                                  tokenizer_seconds=lambda: 0.):
            meters.update(Lm=1.5, tnm=None)
    line = caplog.messages[-1]
    assert line.startswith('[Ep]: [   0/9] [3/4]  eta: 0:00:00  Lm: 1.5000 (1.5000)')
    assert 'images/s: ' in line and 'data/tokenizer/model: ' in line and 'tnm' not in line


@pytest.mark.parametrize(('waiting', 'shares'), [(3, [0.3, 0.3]), (2, []), (0, [])])
def test_waiting_for_data_is_noticed(monkeypatch, waiting, shares):
    """At the second and third progress line; at the first one the loaders have just begun."""
    clock = [0.]
    monkeypatch.setattr(log.time, 'time', lambda: clock[0])

    def batches():
        while True:
            clock[0] += waiting
            yield
    noticed = []
    for _ in MetricLogger().log_every(0, 5, batches(), num_lines=3, on_waiting=noticed.append):
        clock[0] += 10 - waiting  # trains
    assert noticed == pytest.approx(shares)
