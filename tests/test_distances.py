"""Distances beyond FID against stored values of published implementations, closed forms, and invariances."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import kernels
from evaluation.copies import authentic_share, find_copies, nearest_neighbours
from evaluation.fdr import DIVISORS, FDR_ENCODERS, fdr6, ratios
from evaluation.kernels import cmmd, kid, kid_of_subsets
from evaluation.metrics import (
    FeatureStatistics,
    distance_at_infinity,
    frechet_distance,
    infinite_sample_counts,
    vendi_score,
)
from evaluation.precision_recall import density_coverage, manifold_radii
from evaluation.sliced import mind

DATA = Path(__file__).parent / 'data' / 'metrics'
CASES = json.loads((DATA / 'cases.json').read_text())
PAPER = json.loads((DATA / 'paper_table.json').read_text())
EXACT = dict(rel=1e-10, abs=1e-10)


def load(group, *keys):
    with np.load(DATA / f'{group}.npz') as arrays:
        return [torch.from_numpy(arrays[key]) for key in keys]


def sides(group, case):
    """(sample, reference) of a stored case."""
    return load(group, f'{case}.sample', f'{case}.reference')


def draw(count, num_features, seed=0, scale=1.):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, num_features, generator=generator)


def gaussian(rows_NF):
    statistics = FeatureStatistics(rows_NF.shape[1])
    statistics.add(rows_NF)
    return statistics.mean, statistics.covariance()


# ---------------------------------------------------------------------------------------------- stored values
@pytest.mark.parametrize('case', CASES['kid'])
def test_kid(case):
    expected = CASES['kid'][case]
    sample, reference = sides('kid', case)
    assert kid(sample, reference).value == pytest.approx(expected['mmd2_unbiased_all'], **EXACT)
    biased = kernels.squared_mmd(sample, reference, kernels.cubic_kernel, block=7).biased
    assert biased == pytest.approx(expected['mmd2_biased_all'], **EXACT)
    if 'subsets' in expected:
        found = kid_of_subsets(sample, reference, expected['subsets'], expected['subset_size'],
                               expected['rng_seed'])
        assert found.mean == pytest.approx(expected['subset_mean'], **EXACT)
        assert found.std == pytest.approx(expected['subset_std_population'], **EXACT)
        assert found.values_K[:3] == pytest.approx(expected['subset_values_first3'], **EXACT)


@pytest.mark.parametrize('case', CASES['cmmd'])
def test_cmmd(case):
    expected = CASES['cmmd'][case]
    sample, reference = sides('cmmd', case)
    for block in (2000, 9):
        found = cmmd(sample, reference, block=block)
        assert found.biased == pytest.approx(expected['cmmd'], **EXACT)
        assert found.unbiased == pytest.approx(expected['cmmd_unbiased'], **EXACT)


@pytest.mark.parametrize('k', [5, 3])
@pytest.mark.parametrize('case', CASES['prdc'])
def test_density_and_coverage(case, k):
    sample, reference = sides('prdc', case)
    for rows, side in ((sample, 'sample'), (reference, 'reference')):
        radii, = load('prdc', f'{case}.k{k}.radii_{side}')
        assert manifold_radii(rows, 'fp64', k).sqrt().numpy() == pytest.approx(radii.numpy(), rel=1e-6)
    for block in (10_000, 25):
        found = density_coverage(reference, sample, k, block)
        assert found._asdict() == pytest.approx(CASES['prdc'][case][f'k{k}'], rel=1e-12)


def test_ratios_of_six_encoders():
    cases = CASES['fdr']
    generated, validation = {}, {}
    for name in FDR_ENCODERS:
        train, held_out, made, mu, sigma = load('fdr', *(f'{name}.{key}' for key in (
            'train', 'validation', 'generated', 'mu', 'sigma')))
        reference = gaussian(train)
        assert torch.allclose(reference[0], mu.double(), atol=1e-6)
        assert torch.allclose(reference[1], sigma.double(), atol=1e-6)
        generated[name] = frechet_distance(*reference, *gaussian(made))
        validation[name] = frechet_distance(*reference, *gaussian(held_out))
        assert generated[name] == pytest.approx(cases[name]['fd_generated'], rel=1e-9)
        assert validation[name] == pytest.approx(cases[name]['fd_validation'], rel=1e-9)
    found = ratios(generated, validation)
    assert found == pytest.approx({name: cases[name]['fdr'] for name in FDR_ENCODERS}, rel=1e-9)
    assert fdr6(generated, validation) == pytest.approx(cases['fdr6_own'], rel=1e-9)
    assert fdr6(validation, validation) == 1


@pytest.mark.parametrize('name', PAPER['rows'])
def test_ratios_of_the_paper(name):
    """Raw distances of the table divided by either divisor; both are given with two digits."""
    row = PAPER['rows'][name]
    distances = dict(zip(FDR_ENCODERS, row['fd'], strict=True))
    for encoder, ratio in zip(FDR_ENCODERS, row['fdr'], strict=True):
        divisor = DIVISORS['paper'][encoder]
        assert abs(distances[encoder] / divisor - ratio) <= 0.005 / divisor + 0.005 + 4e-4 * ratio, encoder
    assert fdr6(distances, DIVISORS['paper']) == pytest.approx(row['fdr6_paper'], abs=1e-5)
    assert fdr6(distances, DIVISORS['released']) == pytest.approx(row['fdr6_released'], abs=1e-5)


def test_divisors_are_those_of_the_paper_and_of_its_code():
    assert PAPER['order'] == list(FDR_ENCODERS)
    for kind in ('paper', 'released'):
        assert list(DIVISORS[kind].values()) == PAPER['normalisers'][kind]


@pytest.mark.parametrize('case', CASES['mind'])
def test_mind(case):
    expected = CASES['mind'][case]
    sample, reference = sides('mind', case)
    found = mind(sample, reference, num_directions=expected['projections'], seed=expected['rng_seed'])
    assert found.value == pytest.approx(expected['mind'], **EXACT)
    assert found.count == min(len(sample), len(reference))


def test_copies():
    expected = CASES['other']['memory']
    train, validation, sample, index, distance, of_validation = load('other', *(f'memory.{key}' for key in (
        'train', 'test', 'sample', 'nearest', 'distance', 'distance_test')))
    nearest = nearest_neighbours(sample, train)
    assert nearest.index_N.tolist() == index.tolist()
    assert nearest.distance_N.numpy() == pytest.approx(distance.double().numpy(), abs=1e-6)
    found = nearest_neighbours(validation, train).distance_N.numpy()
    assert found == pytest.approx(of_validation.double().numpy(), abs=1e-6)
    copies = find_copies(sample, validation, train)
    assert copies.authentic == pytest.approx(expected['authpct'] / 100, rel=1e-12)
    assert copies.median_sample == pytest.approx(expected['median_distance_sample'], rel=1e-9)
    assert copies.median_validation == pytest.approx(expected['median_distance_test'], rel=1e-9)
    assert copies.share_nearer == pytest.approx(expected['share_closer_than_test_1pct'], rel=1e-12)
    distances = [pair[2] for pair in copies.pairs]
    assert distances == sorted(distances) and len(distances) == 20


def test_vendi_and_the_line_to_infinity():
    sample, = load('other', 'vendi.sample')
    assert vendi_score(sample) == pytest.approx(CASES['other']['vendi']['vendi_cosine'], rel=1e-9)
    case = CASES['other']['fd_infinity']
    assert infinite_sample_counts(50_000) == case['sizes']
    line = distance_at_infinity(case['sizes'], case['values'])
    assert line == pytest.approx((case['intercept'], case['slope']), rel=1e-9)


# ---------------------------------------------------------------------------------------------- closed forms
def test_closed_forms_of_kernels():
    zeros, shifted = torch.zeros(5, 8), torch.zeros(7, 8)
    shifted[:, 0] = 3
    assert kid(zeros, shifted).value == pytest.approx(1 + (9 / 8 + 1) ** 3 - 2, rel=1e-12)
    axes = torch.eye(4)
    for sample, expected in ((axes[:1], 0), (axes[1:2], 2000 * -math.expm1(-1 / 100)),
                             (-axes[:1], 2000 * -math.expm1(-2 / 100))):
        found = cmmd(sample.repeat(3, 1), axes[:1].repeat(5, 1))
        assert found.biased == pytest.approx(expected, abs=1e-9)


def test_closed_forms_of_manifolds():
    rows = draw(40, 6)
    assert density_coverage(rows, rows) == (1, 1, 1, 1)  # 6 / 5 for a comparison that includes the edge
    assert density_coverage(rows, rows + 1000) == (0, 0, 0, 0)


def test_closed_forms_of_the_others():
    rows, shift = draw(30, 5), torch.tensor([1., 0, 2, 0, 0])
    generator = torch.Generator().manual_seed(2020)
    directions = torch.randn(64, 5, generator=generator).double()
    directions /= directions.norm(dim=1, keepdim=True)
    expected = 3 * 5 * (directions @ shift.double()).square().mean().item()
    assert mind(rows, rows + shift, num_directions=64).value == pytest.approx(expected, rel=1e-5)
    assert vendi_score(3 * torch.eye(6)) == pytest.approx(6, rel=1e-9)
    assert vendi_score(torch.ones(9, 4)) == pytest.approx(1, rel=1e-9)
    counts = infinite_sample_counts(1000)
    assert counts[0] == 100 and counts[-1] == 1000 and len(counts) == 15
    assert distance_at_infinity(counts, [2.5 + 7 / count for count in counts]).at_infinity \
        == pytest.approx(2.5, rel=1e-9)


def test_copies_are_seen_as_such():
    train, sample = draw(200, 6), draw(50, 6, seed=1)
    copied = sample.clone()
    copied[:20] = train[30:50] + 1e-4
    validation = draw(100, 6, seed=2)
    honest, copying = (find_copies(rows, validation, train) for rows in (sample, copied))
    assert copying.share_nearer >= 0.4 > 0.1 > honest.share_nearer
    assert copying.authentic <= 0.6 * honest.authentic + 0.2
    assert {pair[:2] for pair in copying.pairs} == {(i, i + 30) for i in range(20)}
    assert authentic_share(nearest_neighbours(train, train), torch.ones(200)) == 0


# ---------------------------------------------------------------------------------------------- invariances
@pytest.fixture(scope='module')
def clouds():
    """Two sets that differ a little, of unit length where that is needed."""
    return draw(60, 8), draw(70, 8, seed=1, scale=1.2) + 0.2


SYMMETRIC = {
    'kid': lambda x, y: kid(x, y).value,
    'cmmd': lambda x, y: cmmd(torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)).biased,
    'mind': lambda x, y: mind(x[:60], y[:60], num_directions=20).value,
    'fd': lambda x, y: frechet_distance(*gaussian(x), *gaussian(y)),
}


@pytest.mark.parametrize('name', SYMMETRIC)
def test_order_of_rows_and_of_sides_changes_nothing(clouds, name):
    sample, reference = clouds
    score = SYMMETRIC[name]
    expected = score(sample, reference)
    assert score(reference, sample) == pytest.approx(expected, rel=1e-9)
    if name != 'mind':  # which is given the first rows above
        assert score(sample.flip(0), reference) == pytest.approx(expected, rel=1e-9)
        assert score(sample, reference.flip(0)) == pytest.approx(expected, rel=1e-9)
    rotation = torch.linalg.qr(draw(8, 8, seed=3).double()).Q
    if name != 'mind':  # whose directions do not turn with the rows
        turned = score(sample.double() @ rotation, reference.double() @ rotation)
        assert turned == pytest.approx(expected, rel=1e-5)


def test_invariances_of_manifolds(clouds):
    sample, reference = clouds
    found = density_coverage(reference, sample)
    assert density_coverage(reference.flip(0), sample.flip(0)) == pytest.approx(found, rel=1e-12)
    assert density_coverage(4 * reference, 4 * sample) == found
    swapped = density_coverage(sample, reference)
    assert (swapped.precision, swapped.recall) == pytest.approx((found.recall, found.precision))


def test_scales(clouds):
    sample, reference = clouds
    for name in ('mind', 'fd'):
        score = SYMMETRIC[name]
        assert score(2 * sample, 2 * reference) == pytest.approx(4 * score(sample, reference), rel=1e-6)


def test_error_of_kid_is_that_of_other_samples():
    """The error bar against the spread over independent samples that differ from the reference."""
    reference = draw(300, 6, seed=99)
    estimates = [kid(draw(200, 6, seed) + 1, reference) for seed in range(30)]
    spread = np.std([estimate.value for estimate in estimates], ddof=1)
    assert np.mean([estimate.error for estimate in estimates]) == pytest.approx(spread, rel=0.4)
    assert math.isnan(kid(draw(19, 6), reference).error)


@pytest.mark.slow
def test_equal_laws():
    """200 pairs of sets: no bias of the kernels, density 1, coverage by its formula."""
    unit = torch.nn.functional.normalize
    values = {name: [] for name in ('kid', 'cmmd', 'density', 'coverage')}
    for seed in range(200):
        sample, reference = draw(100, 6, 2 * seed), draw(100, 6, 2 * seed + 1)
        values['kid'].append(kid(sample, reference).value)
        values['cmmd'].append(cmmd(unit(sample), unit(reference)).unbiased)
        prdc = density_coverage(reference, sample)
        values['density'].append(prdc.density)
        values['coverage'].append(prdc.coverage)
    empty = math.prod((100 - i) / (200 - i) for i in range(1, 6))  # no sample within a ball
    expected = dict(kid=0, cmmd=0, density=1, coverage=1 - empty)
    for name, numbers in values.items():
        error = np.std(numbers, ddof=1) / 200 ** 0.5
        assert abs(np.mean(numbers) - expected[name]) <= 3 * error, name


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(('change', 'message'), [
    (lambda rows: rows[:, :5], 'features of one network'),
    (lambda rows: rows[:1], 'at least'),
    (lambda rows: rows.index_fill(0, torch.tensor([4]), torch.nan), 'image 4 has nan'),
])
def test_sets_that_cannot_be_compared(clouds, change, message):
    sample, reference = clouds
    for score in (kid, cmmd, mind, lambda x, y: density_coverage(y, x)):
        with pytest.raises(ValueError, match=message):
            score(change(sample), reference)


def test_subsets_need_as_many_rows(clouds):
    with pytest.raises(ValueError, match='at least 1000 images in the sample, got 60'):
        kid_of_subsets(*clouds)


def test_ratios_need_all_six_and_divisors_above_zero():
    distances = dict.fromkeys(FDR_ENCODERS, 2.)
    assert fdr6(distances, dict.fromkeys(FDR_ENCODERS, 1.)) == 2
    with pytest.raises(ValueError, match='of mae is missing'):
        fdr6({name: 2. for name in FDR_ENCODERS if name != 'mae'}, DIVISORS['paper'])
    with pytest.raises(ValueError, match='above zero for mae'):
        fdr6(distances, DIVISORS['paper'] | dict(mae=0.))
