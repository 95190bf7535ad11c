"""Frechet distance, Inception Score, precision and recall against the original evaluation of ADM."""
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import metrics
from evaluation import precision_recall as manifolds
from evaluation.digits_features import DigitsFeatures
from evaluation.metrics import FeatureStatistics, InceptionScore, frechet_distance, read_statistics
from evaluation.precision_recall import manifold_coverage, manifold_radii, precision_recall
from models import VQVAE
from tests.runs import TINY_VQVAE, fork_server
from utils.misc import full_precision

REPO = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / 'data' / 'evaluation'
CASES = json.loads((DATA / 'cases.json').read_text())


def load(file, *keys):
    with np.load(DATA / f'{file}.npz') as arrays:
        return [torch.from_numpy(arrays[key]) for key in keys]


def succeeding(section):
    return [name for name, case in CASES[section].items() if case.get('original', 0) is not None
            and 'error' not in case]


def statistics_of(features_NF, *sizes):
    statistics = FeatureStatistics(features_NF.shape[1])
    for part in features_NF.split(list(sizes) or len(features_NF)):
        statistics.add(part)
    return statistics


def gaussian(features_NF):
    statistics = statistics_of(features_NF)
    return statistics.mean, statistics.covariance()


# ---------------------------------------------------------------------------------------------- statistics
def test_statistics_of_any_split_are_those_of_numpy():
    rng = np.random.RandomState(0)
    features = torch.from_numpy(rng.standard_normal((90, 7)).astype(np.float32) * 0.05 + 30)
    expected = np.cov(features.double().numpy(), rowvar=False)
    for _ in range(5):
        cuts = np.sort(rng.randint(0, 91, 8))  # equal neighbours make empty batches
        statistics = statistics_of(features, *np.diff([0, *cuts, 90]).tolist())
        assert statistics.count == 90
        np.testing.assert_allclose(statistics.mean, features.double().mean(0), rtol=1e-13)
        np.testing.assert_allclose(statistics.covariance(), expected, rtol=0, atol=1e-10 * expected.max())


def test_statistics_do_not_depend_on_order():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * 3 + 50
    whole = statistics_of(features)
    for parts in itertools.permutations((features[:3], features[3:3], features[3:20], features[20:])):
        merged = statistics_of(torch.cat(parts), *map(len, parts))
        assert merged.count == 40
        assert (merged.mean - whole.mean).abs().max() <= 1e-10
        assert (merged.covariance() - whole.covariance()).abs().max() <= 1e-10 * whole.covariance().max()


def test_statistics_name_the_image_that_is_not_finite():
    features = torch.zeros(6, 3)
    features[4, 1] = -torch.inf
    features[5, 0] = torch.nan
    statistics = statistics_of(features[:3])
    for first, number in ((None, 3 + 4), (100, 104)):
        with pytest.raises(ValueError, match=f'image {number} gives nan or infinite'):
            statistics.add(features, first)
    assert statistics.count == 3  # the others are as before


def test_statistics_of_two_networks_in_one_file(tmp_path):
    path = tmp_path / 'stats.npz'
    arrays = dict(mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32),
                  mu_s=np.arange(2, dtype=np.float32), sigma_s=np.eye(2, dtype=np.float32) / 3)
    np.savez(path, **arrays)
    mu, sigma = read_statistics(path, 2, '_s')
    assert mu.dtype == sigma.dtype == torch.float64 and mu.tolist() == [0, 1]
    assert torch.equal(sigma, torch.from_numpy(arrays['sigma_s']).double())
    assert read_statistics(path, 3)[0].tolist() == [0, 0, 0]
    del arrays['sigma_s']
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r'mu_s and sigma_s of .*cannot use .*it has no sigma_s'):
        read_statistics(path, 2, '_s')
    noise = np.random.RandomState(0).rand(50, 50)
    np.savez_compressed(path, mu=np.zeros(50), sigma=noise + noise.T)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='cannot read'):
        read_statistics(path, 50)


# ---------------------------------------------------------------------------------------------- distance
@pytest.mark.parametrize('name', succeeding('fid'))
def test_distance_of_features(name):
    case = CASES['fid'][name]
    a, b = (gaussian(features) for features in load('fid', f'{name}.a', f'{name}.b'))
    distance, original = frechet_distance(*a, *b), frechet_distance(*a, *b, method='scipy')
    assert distance == pytest.approx(case['expected'], rel=1e-8, abs=1e-6)
    # Newer versions of SciPy find no root of zero, and the original then adds 1e-6 to five variances of both.
    tolerances = dict(large_mean_small_var=2e-4, wide_d512_n96=3e-5, constant_both=1.01e-5)
    in_float32 = tolerances.get(name, 1e-6)
    for value in (distance, original):
        assert value == pytest.approx(case['original'], rel=1e-6, abs=in_float32)
    traces = (a[1].trace() + b[1].trace()).item()
    assert frechet_distance(*b, *a) == pytest.approx(distance, rel=1e-8, abs=1e-8 * traces)
    assert abs(frechet_distance(*a, *a)) <= 1e-7 * (1 + traces)
    if name.startswith('full_rank'):
        assert original == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize('name', CASES['fid_stats'])
def test_distance_of_hard_statistics(name):
    case = CASES['fid_stats'][name]
    stats = load('fid', *(f'stats_{name}.{key}' for key in ('mu_a', 'sigma_a', 'mu_b', 'sigma_b')))
    assert frechet_distance(*stats) == pytest.approx(case['expected'], rel=1e-7)
    assert frechet_distance(*stats[2:], *stats[:2]) == pytest.approx(case['expected'], rel=1e-7)
    if case['original'] is not None:  # newer versions of SciPy find roots where older ones found none
        assert frechet_distance(*stats, method='scipy') == pytest.approx(case['original'], rel=1e-3)


@pytest.mark.parametrize('name', ['singular_0', 'singular_1', 'singular_2'])
def test_diagonals_grow_where_scipy_finds_no_root(name, monkeypatch, caplog):
    """As on the SciPy of the original: its values are met, which are not exact."""
    sqrtm, calls = metrics.linalg.sqrtm, []

    def failing_once(matrix):
        calls.append(matrix)
        return sqrtm(matrix) if len(calls) > 1 else matrix * np.nan
    monkeypatch.setattr(metrics.linalg, 'sqrtm', failing_once)
    stats = load('fid', *(f'stats_{name}.{key}' for key in ('mu_a', 'sigma_a', 'mu_b', 'sigma_b')))
    distance = frechet_distance(*stats, method='scipy')
    assert distance == pytest.approx(CASES['fid_stats'][name]['original'], rel=1e-6)
    assert distance != pytest.approx(CASES['fid_stats'][name]['expected'], rel=1e-5)
    assert len(calls) == 2 and 'adding 1e-6' in caplog.text


def test_complex_roots(monkeypatch):
    sqrtm, statistics = metrics.linalg.sqrtm, (torch.zeros(3), torch.eye(3), torch.ones(3), 4 * torch.eye(3))
    for imaginary in (1e-4, 1e-2, np.nan):
        monkeypatch.setattr(metrics.linalg, 'sqrtm', lambda m, i=imaginary: sqrtm(m) + 1j * i * np.eye(3))
        if imaginary == 1e-4:
            assert frechet_distance(*statistics, method='scipy') == pytest.approx(3 + 3, rel=1e-12)
        else:
            with pytest.raises(ValueError, match=r'imaginary parts up to.*eigh'):
                frechet_distance(*statistics, method='scipy')


@pytest.mark.parametrize('method', ['eigh', 'scipy'])
def test_distance_refuses_numbers_that_are_not_finite(method):
    good = torch.zeros(2), torch.eye(2)
    for bad in ((torch.tensor([0, torch.nan]), torch.eye(2)), (torch.zeros(2), torch.eye(2) * torch.inf)):
        with pytest.raises(ValueError, match='set 2 of 2'):
            frechet_distance(*good, *bad, method=method)
    with pytest.raises(ValueError, match='equal size'):
        frechet_distance(*good, torch.zeros(3), torch.eye(3), method=method)


# ---------------------------------------------------------------------------------------------- classes
def scores_of(logits_NC, split_size, batch=173):
    """Batches that straddle chunks, in a random order."""
    scores = InceptionScore(len(logits_NC), logits_NC.shape[1], split_size)
    for first in np.random.RandomState(0).permutation(range(0, len(logits_NC), batch)).tolist():
        scores.add(logits_NC[first:first + batch], first)
    scores.add(logits_NC[:0], 0)
    return scores.scores()


@pytest.mark.parametrize('name', CASES['is'])
def test_inception_score(name):
    case = CASES['is'][name]
    acts, weight = load('inception_score', f'{name}.acts', f'{name}.weight_in_out')
    logits, size = acts.double() @ weight.double(), case['split_size']
    chunked, whole = scores_of(logits, size)
    assert chunked == pytest.approx(case['inception_score_float64'], rel=1e-10)
    assert scores_of(logits, len(logits)) == (pytest.approx(whole, rel=1e-12),) * 2
    last = logits[(len(logits) - 1) // size * size:]
    assert scores_of(last, size)[0] == pytest.approx(case['per_split_float64'][-1], rel=1e-10)
    in_float32 = scores_of(acts @ weight, size)[0]  # the original's own sums may underflow to nan
    expected = case['inception_score_float64' if case['inception_score'] == 'nan' else 'inception_score']
    assert in_float32 == pytest.approx(expected, rel=1e-5)


def test_order_matters_to_chunks_alone():
    acts, weight = load('inception_score', 'sorted_by_class.acts', 'sorted_by_class.weight_in_out')
    chunked, whole = scores_of(acts @ weight, 60)
    shuffled = scores_of((acts @ weight)[torch.randperm(len(acts))], 60)
    assert chunked < 1.001 and shuffled[0] > 7.5 and whole > 1.2 * chunked
    assert shuffled[1] == pytest.approx(whole, rel=1e-12) and shuffled[1] < 1.2 * shuffled[0]


def test_sure_images_score_the_number_of_classes():
    for scale in (1e3, 1e30):  # beyond what float32, then float64 can express as probabilities
        logits = torch.eye(6).repeat(4, 1) * scale
        assert scores_of(logits, 12, batch=5) == (pytest.approx(6, rel=1e-12), pytest.approx(6, rel=1e-12))


def test_inception_score_refuses_what_is_missing_or_not_finite():
    scores = InceptionScore(10, 3, 4)
    logits = torch.zeros(6, 3)
    scores.add(logits, 0)
    with pytest.raises(AssertionError):
        scores.scores()
    logits[2, 1] = torch.nan
    with pytest.raises(ValueError, match='image 6 gives nan'):
        scores.add(logits, 4)


# ---------------------------------------------------------------------------------------------- manifolds
CRAFTED = ('disjoint', 'grid_ties', 'grid_shift_one', 'line_border', 'nested', 'nested_reversed', 'mode_drop',
           'outlier_ball', 'fp16_overflow_all', 'fp16_overflow_some_blocks', 'four_points')


def features_of(name):
    return [points.float() for points in load('precision_recall', f'{name}.ref', f'{name}.sample')]


@pytest.mark.parametrize('name', succeeding('pr'))
def test_precision_and_recall(name):
    case = CASES['pr'][name]
    reference, sample = features_of(name)
    counts = torch.tensor([len(sample), len(reference)])
    block = dict(block=case['row_batch'])

    def flips(mode, suffix):
        expected = torch.tensor([case[f'precision{suffix}'], case[f'recall{suffix}']])
        return (torch.tensor(precision_recall(reference, sample, mode, **block)) - expected).abs() * counts
    assert flips('adm', '').max() <= (1e-3 if name in CRAFTED else 2.001)
    assert flips('fp32', '_fp32').max() <= 1.001

    radii = [manifold_radii(points, **block) for points in (reference, sample)]
    expected = load('precision_recall', f'{name}.radii_ref', f'{name}.radii_sample')
    for radii_N, expected_N in zip(radii, expected, strict=True):
        atol = 2e-2 if name == 'duplicates' else 1e-6
        torch.testing.assert_close(radii_N, expected_N, rtol=8e-3, atol=atol)
    if name not in ('fp16_overflow_some_blocks', 'multi_block', 'multi_block_reference'):  # none are stored
        covered = manifold_coverage(reference, radii[0], sample, radii[1], **block)
        expected = load('precision_recall', f'{name}.ref_covered', f'{name}.sample_covered')
        for covered_N, expected_N in zip(covered, expected, strict=True):
            assert (covered_N != expected_N).sum() <= (0 if name in CRAFTED else 2)


def whole_numbers(count, seed, largest=8):
    """Features whose distances are exact in float16, so that rounding hides nothing."""
    return torch.randint(largest, (count, 6), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize('mode', ['adm', 'fp32'])
def test_neither_blocks_nor_slices_nor_roles_change_the_scores(mode, monkeypatch):
    reference, sample = whole_numbers(90, 0), whole_numbers(70, 1, largest=7)
    expected = precision_recall(reference, sample, mode)
    assert 0 < expected.recall < expected.precision < 1
    for block, size in ((10_000, 1), (31, 100), (7, 4)):
        monkeypatch.setattr(manifolds, 'SLICE', size)
        assert precision_recall(reference, sample, mode, block=block) == expected
        assert precision_recall(sample, reference, mode, block=block) == expected[::-1]


def test_float16_that_overflows_is_redone_by_blocks(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    points = torch.rand(30, 16, generator=rng)
    assert not torch.equal(manifold_radii(points), manifold_radii(points, 'fp32'))
    points[25] *= 300  # its squared norm is beyond float16
    for size in (1, 2 ** 21):  # the whole block, whatever the slices
        monkeypatch.setattr(manifolds, 'SLICE', size)
        assert torch.equal(manifold_radii(points), manifold_radii(points, 'fp32'))
    far = torch.arange(200., 206)[:, None]  # products overflow, norms do not: 0 as in the original
    assert not manifold_radii(far).any() and manifold_radii(far, 'fp32').tolist() == [9, 4, 4, 4, 4, 9]


def test_precision_and_recall_refuse():
    points = whole_numbers(5, 0)
    reference, sample = features_of('three_points')
    with pytest.raises(ValueError, match='at least 4 reference images, got 3'):
        precision_recall(reference, sample)
    with pytest.raises(ValueError, match='at least 4 sample images, got 3'):
        precision_recall(points, points[:3])
    with pytest.raises(ValueError, match='6 of the reference, 5 of the samples'):
        precision_recall(points, points[:, :5])
    for bad in (torch.nan, -torch.inf):
        broken = points.clone()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match='sample image 3 has nan'):
            precision_recall(points, broken)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_square_of_the_number():
    """All distances are 144 MB in float32, and several copies live at once; those of a slice are 8 MB."""
    code = '''
import resource, torch
from evaluation.precision_recall import precision_recall
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
points = torch.rand(6000, 3)
precision_recall(points[:500], points[:500])
before = peak()
for mode in ('adm', 'fp32'):
    precision_recall(points, points[:1000], mode)
print(peak() - before)
'''
    run = subprocess.run([sys.executable, '-c', code], cwd=REPO, text=True, capture_output=True,
                         env={**os.environ, 'OMP_NUM_THREADS': '1'}, check=True)
    assert float(run.stdout) < 110


NEW_PRECISION = hasattr(torch.backends.cuda.matmul, 'fp32_precision')


def test_settings_of_precision_are_the_callers_again():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def settings():
        return (torch.get_float32_matmul_precision(), cudnn.allow_tf32,
                matmul.allow_fp16_reduced_precision_reduction)
    original = settings()
    try:
        torch.set_float32_matmul_precision('high')
        cudnn.allow_tf32 = matmul.allow_fp16_reduced_precision_reduction = True
        with pytest.raises(KeyError), full_precision():
            assert not cudnn.allow_tf32 and not matmul.allow_fp16_reduced_precision_reduction
            assert torch.get_float32_matmul_precision() == 'highest'
            raise KeyError
        assert settings() == ('high', True, True)
    finally:
        torch.set_float32_matmul_precision(original[0])
        cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction = original[1:]


@pytest.mark.skipif(not NEW_PRECISION, reason='torch has one setting of precision for all backends')
@pytest.mark.slow
@pytest.mark.parametrize('place', ['matmul', 'conv', 'everything'])
def test_precision_set_backend_by_backend_neither_breaks_anything_nor_is_lost(place):
    """Once a caller has used the newer settings, torch refuses to read the older ones."""
    process = fork_server().Process(target=with_precision_of, args=(place,))
    process.start()
    process.join()
    assert process.exitcode == 0


def with_precision_of(place):
    """In a process of its own, as nothing takes these settings back."""
    warnings.simplefilter('error')
    backends = dict(matmul=torch.backends.cuda.matmul, conv=torch.backends.cudnn.conv,
                    everything=torch.backends)
    backends[place].fp32_precision = 'tf32'
    places = (*backends.values(), torch.backends.cudnn, torch.backends.cudnn.rnn,
              torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)

    def settings():
        return [backend.fp32_precision for backend in places]
    before = settings()
    images = torch.rand(2, 3, 16, 16)
    vae = VQVAE(**TINY_VQVAE)
    assert len(vae.encode(images * 2 - 1)) == 3 and settings() == before
    DigitsFeatures().outputs((images * 255).byte())
    assert settings() == before
    with full_precision():
        assert 'tf32' not in (torch.backends.cuda.matmul.fp32_precision,
                              torch.backends.cudnn.conv.fp32_precision)
    assert settings() == before
    torch.backends.fp32_precision = 'ieee'  # what followed it still does
    assert place != 'everything' or torch.backends.cuda.matmul.fp32_precision == 'ieee'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('name', succeeding('pr'))
def test_cuda_gives_the_scores_of_the_cpu(name):
    points, block = features_of(name), CASES['pr'][name]['row_batch']
    counts = torch.tensor([len(features) for features in points[::-1]])
    for mode in ('adm', 'fp32'):
        here, there = (torch.tensor(precision_recall(*points, mode, block=block, device=device))
                       for device in ('cpu', 'cuda'))
        assert ((here - there).abs() * counts).max() <= 2.001
    statistics = [t for features in points for t in gaussian(features)]
    distance = frechet_distance(*(t.cuda() for t in statistics))
    assert distance == pytest.approx(frechet_distance(*statistics), rel=1e-7, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_distance_is_computed_where_one_covariance_is_on_cuda(monkeypatch):
    eigh, devices = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, 'eigh', lambda t: (devices.append(t.device.type), eigh(t))[1])
    here, there = (torch.zeros(3), torch.eye(3)), (torch.ones(3).cuda(), 4 * torch.eye(3).cuda())
    assert frechet_distance(*here, *there) == pytest.approx(6) == frechet_distance(*there, *here)
    assert devices == ['cuda', 'cuda']
    assert frechet_distance(*here, *there, method='scipy') == pytest.approx(6)


# ---------------------------------------------------------------------------------------------- all together
@pytest.mark.parametrize('name', CASES['report'])
def test_report_of_the_original(name):
    case = CASES['report'][name]
    for kind, key, suffix in (('pool', 'fid', ''), ('spatial', 'sfid', '_s')):
        reference, sample = load('report', f'ref_{kind}', f'sample_{kind}')
        stored = name == 'with_reference_statistics'
        statistics = read_statistics(DATA / 'report.npz', reference.shape[1], suffix) if stored \
            else gaussian(reference)
        for method in ('eigh', 'scipy'):
            distance = frechet_distance(*gaussian(sample), *statistics, method)
            assert distance == pytest.approx(case[key], rel=1e-6)
    reference, sample, weight = load('report', 'ref_pool', 'sample_pool', 'weight_in_out')
    assert scores_of(sample @ weight, 5000)[0] == pytest.approx(case['inception_score'], rel=1e-5)
    precision, recall = precision_recall(reference, sample)
    assert precision == pytest.approx(case['precision'], abs=2 / len(sample))
    assert recall == pytest.approx(case['recall'], abs=2 / len(reference))
