"""Scaling laws: known exponents are found again, intervals cover them, trainings are counted as they are."""
import dataclasses
import json
import re

import numpy as np
import pytest
import torch

import evaluate
from configs import parse_training
from evaluation.scaling_laws import (
    SCORES,
    Run,
    count_parameters,
    fit_all,
    fit_power_law,
    law_of_size,
    pareto_front,
    read_runs,
    runs_of_report,
    table_of_laws,
    unbuilt_model,
)
from evaluation.settings import parse_evaluation
from models import VAR, VQVAE
from tests.runs import TINY_VQVAE, kept_logging, make_tokenizer
from training.build import build_model
from utils.files import write_text

SIZES = np.geomspace(2e4, 3e8, 7)


def law_with(alpha, beta, floor, x):
    return floor + (beta * np.asarray(x, dtype=float)) ** alpha


# ---------------------------------------------------------------------------------------------- fits
@pytest.mark.parametrize('alpha', [-0.02, -0.1, -0.23, -0.6])
@pytest.mark.parametrize('beta', [1e-6, 2.5])
def test_known_exponents_are_found_within_one_percent(alpha, beta):
    """The requirement is 1 %; without noise a power law is found to rounding, one with a floor to 0.1 %."""
    found = fit_power_law(SIZES, law_with(alpha, beta, 0, SIZES))
    assert found.alpha == pytest.approx(alpha, rel=1e-9)
    assert found.beta == pytest.approx(beta, rel=1e-6)
    assert found.correlation == pytest.approx(-1)
    for floor in (0.5, 2.):
        y = law_with(alpha, beta, floor * law_with(alpha, beta, 0, SIZES[-1]), SIZES)
        found = fit_power_law(SIZES, y, has_floor=True)
        assert found.alpha == pytest.approx(alpha, rel=1e-3)
        assert found.beta == pytest.approx(beta, rel=1e-2)
        assert found.floor == pytest.approx(y[-1] - law_with(alpha, beta, 0, SIZES[-1]), rel=1e-3)
        assert np.allclose(found(SIZES), y, rtol=1e-6)


def test_a_floor_that_is_not_there_is_not_found():
    y = law_with(-0.2, 1e-3, 0, SIZES)
    found = fit_power_law(SIZES, y, has_floor=True)
    assert found.floor < 1e-3 * y[-1]
    assert found.alpha == pytest.approx(-0.2, rel=1e-2)


def test_intervals_cover_the_exponent():
    """Of 60 ladders with errors of 2 %, at least 80 % hold the exponent; less noise narrows them."""
    rng = np.random.default_rng(0)
    widths = []
    covered = 0
    for _ in range(60):
        y = law_with(-0.2, 1e-3, 0, SIZES) * np.exp(0.02 * rng.standard_normal(len(SIZES)))
        low, high = law_of_size(SIZES, y, False, 200, rng).alpha_interval
        covered += low < -0.2 < high
        widths.append(high - low)
    assert 48 <= covered < 60
    quiet = law_with(-0.2, 1e-3, 0, SIZES) * np.exp(0.002 * rng.standard_normal(len(SIZES)))
    low, high = law_of_size(SIZES, quiet, False, 200, rng).alpha_interval
    assert high - low < np.median(widths) / 4


@pytest.mark.parametrize(('x', 'y'), [([1, 1], [2, 2]), ([1, 2], [0, 1]), ([1, 2, 3], [1, 2])])
def test_points_that_decide_nothing_are_refused(x, y):
    with pytest.raises(ValueError, match='expected at least 2 points of different positive x'):
        fit_power_law(x, y)


def test_front_has_the_cheapest_way_to_every_score():
    small = np.array([1., 2., 4.]), np.array([5., 4., 3.9])
    large = np.array([2., 4., 8.]), np.array([6., 3., 3.5])
    x, y = pareto_front([small, large])
    assert x.tolist() == [1, 2, 4] and y.tolist() == [5, 4, 3]


# ---------------------------------------------------------------------------------------------- trainings
ALPHA, BETA, FLOOR = -0.15, 1e-3, 0.4


def ladder(floor=0.):
    """Trainings whose ends lie on one law over N, and whose front lies on another one over compute."""
    runs = []
    images = [2 ** i for i in range(1, 9)]
    for depth in range(1, 7):
        parameters = 4608 * depth ** 3
        compute = np.array(images) * 60. * parameters
        # A training follows the law of the front until it is as good as its size allows, after 16 images.
        end = float(law_with(ALPHA, BETA, floor, 60. * 16 * parameters))
        curve = np.maximum(law_with(ALPHA, BETA, floor, compute), end)
        scores = {score: curve.tolist() for score in SCORES}
        runs.append(Run(f'd{depth}', depth, 16 * depth, parameters, 30, 60 * parameters, images, scores))
    return runs


@pytest.mark.parametrize(('kind', 'floor'), [('power', 0.), ('floor', FLOOR)])
def test_laws_of_a_ladder_are_found_within_one_percent(kind, floor):
    laws = fit_all(ladder(floor), draws=50)
    for score in SCORES:
        for axis in ('parameters', 'compute'):
            law = laws[score][axis][kind]
            assert law.alpha == pytest.approx(ALPHA, rel=0.01), (score, axis)
            low, high = law.alpha_interval
            assert low <= law.alpha + 1e-6 and high >= law.alpha - 1e-6
    assert laws['loss_all']['parameters']['power'].correlation < -0.98
    again = fit_all(ladder(floor), draws=50)
    assert table_of_laws(laws) == table_of_laws(again)


def write_log(folder, tokenizer, depth, *flags, ends=True):
    """The log.txt of a training of two epochs, evaluated after both."""
    config = parse_training([f'--depth={depth}', '--pn=1_2_4', '--patch_size=4', '--bs=8', '--ep=2',
                             f'--vae_ckpt={tokenizer}', '--data_path=digits', *flags])
    lines = [dict(name='text', args=vars(config))]
    for epoch in range(1, 3 if ends else 2):
        loss = 3 * depth ** -0.3 / epoch ** 0.1
        lines.append(dict(it=5 * epoch, ep=f'{epoch}/2', vL_mean=loss, vL_tail=loss + 0.1,
                          vacc_mean=10. * depth, vacc_tail=5. * depth))
    folder.mkdir(parents=True)
    write_text(folder / 'log.txt', ''.join(json.dumps(line) + '\n' for line in lines))


@pytest.fixture
def logs(tmp_path):
    """Five trainings, one of which has not ended, beside that of a tokenizer."""
    tokenizer = make_tokenizer(tmp_path / 'vae.pth')
    torch.save(dict(model=torch.load(tokenizer), config=VQVAE(**TINY_VQVAE).config_state(1.)), tokenizer)
    for depth in range(1, 5):
        write_log(tmp_path / 'runs' / f'd{depth}', tokenizer, depth, f'--width={16 * depth}')
    write_log(tmp_path / 'runs' / 'd5', tokenizer, 5, ends=False)
    (tmp_path / 'runs' / 'vqvae').mkdir()
    write_text(tmp_path / 'runs' / 'vqvae' / 'log.txt', json.dumps(dict(args=dict(model='vqvae'))) + '\n')
    return tmp_path / 'runs'


def test_trainings_are_counted(logs, caplog):
    runs = read_runs(logs)
    assert [run.name for run in runs] == ['d1', 'd2', 'd3', 'd4']
    assert 'd5 is left out: its training has not ended (epoch 1 of 2)' in caplog.text
    vae = VQVAE(**TINY_VQVAE)
    for run in runs:
        depth = run.depth
        model = VAR(vae, 10, attn_l2_norm=True, patch_nums=(1, 2, 4),
                    **VAR.kwargs_from_size(depth, 16 * depth))
        of_blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
        assert (run.width, run.parameters) == (16 * depth, of_blocks)
        assert run.tokens_per_image == model.L == 21
        assert run.images == [40, 80] and run.tokens.tolist() == [840, 1680]
        assert run.compute.tolist() == [40 * model.training_flops(21), 80 * model.training_flops(21)]
        assert run.scores['loss_all'][0] == 3 * depth ** -0.3
        assert run.scores['error_last'] == [1 - 0.05 * depth] * 2


def test_parameters_are_those_of_the_paper(logs):
    """73,728 d^3, and less than 1 % of biases and norms."""
    config = parse_training(['--depth=12', f'--vae_ckpt={logs.parent / "vae.pth"}', '--pn=1_2_4',
                             '--patch_size=4'])
    assert count_parameters(unbuilt_model(config)) == pytest.approx(73728 * 12 ** 3, rel=0.01)


def test_command_writes_report_and_plot(logs, tmp_path, capsys):
    report = tmp_path / 'out' / 'scaling.json'
    plot = tmp_path / 'out' / 'scaling.png'
    with kept_logging():
        evaluate.main(parse_evaluation(
            ['scaling', str(logs), f'--json={report}', f'--plot={plot}', '--draws=20'], ''))
    printed = capsys.readouterr().out
    assert 'parameters' in printed and 'loss_last' in printed
    content = json.loads(report.read_text())
    law = content['laws']['loss_all']['parameters']['power']
    runs = read_runs(logs)
    expected = fit_power_law([run.parameters for run in runs], [run.scores['loss_all'][-1] for run in runs])
    assert law['alpha'] == expected.alpha and law['beta'] == expected.beta and len(law['alpha_interval']) == 2
    assert runs_of_report(report) == runs
    assert plot.stat().st_size > 20_000


def test_what_cannot_be_fitted_is_said_in_one_line(logs, tmp_path):
    write_log(tmp_path / 'runs' / 'd6', tmp_path / 'vae.pth', 6, '--pg=0.5', '--pg0=1')
    with pytest.raises(ValueError, match='progressive training, whose steps do not all cost the same'):
        read_runs(logs)
    (tmp_path / 'few').mkdir()
    with pytest.raises(ValueError, match=r'expected at least 4 finished trainings of VAR in .*, got 0'):
        read_runs(tmp_path / 'few')
    write_text(tmp_path / 'other.json', '{}')
    with pytest.raises(ValueError, match='found no trainings'):
        runs_of_report(tmp_path / 'other.json')


# ---------------------------------------------------------------------------------------------- widths
@pytest.mark.parametrize(('flags', 'width'), [([], 128), (['--width=32'], 32)])
def test_width_of_a_training(tmp_path, flags, width):
    """The weights tell it, and as many heads as the depth."""
    tokenizer = make_tokenizer(tmp_path / 'vae.pth')
    config = parse_training(['--pn=1_2_4', '--patch_size=4', '--depth=2', f'--vae_ckpt={tokenizer}', *flags])
    model = build_model(config, num_classes=4, total_steps=1, steps_per_epoch=1, device='cpu')
    kwargs = VAR.kwargs_from_state_dict(model.state_dict())
    assert (kwargs['depth'], kwargs['embed_dim'], kwargs['num_heads']) == (2, width, 2)
    assert config.derived(1)['init_std'] == (1 / (3 * width)) ** 0.5


@pytest.mark.parametrize(('flags', 'message'), [
    (['--depth=3', '--width=32'], '--width must be a multiple of --depth=3, .* got 32: pass --width=30'),
    (['--depth=2', '--width=32', '--anorm=0'], '--width needs --anorm=1')])
def test_widths_that_do_not_fit(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_training(flags)
    assert re.search(message, capsys.readouterr().err)


def test_settings_of_a_run_survive_the_report():
    run = ladder()[0]
    assert Run(**json.loads(json.dumps(dataclasses.asdict(run)))) == run
