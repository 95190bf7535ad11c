"""Scores against references and definitions, statistics in parts, pictures, usage."""
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import uniform_filter

import dist
import trainer
from evaluation.metrics import (
    SSIM_DEFINITIONS,
    FeatureStatistics,
    mean_squared_error,
    psnr,
    read_statistics,
    ssim,
    to_uint8,
)
from evaluation.pairs import PairScores
from evaluation.pictures import reconstruction_rows, save_png, usage_heat_map
from models.tokenizers.losses import LPIPS, PyramidLoss
from models.tokenizers.usage import CodeUsage

DATA = Path(__file__).parent / 'data' / 'evaluation'
CASES = json.loads((DATA / 'cases.json').read_text())


def noise_u8(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------- pixels
def test_eight_bits_round_half_up_and_clamp():
    levels = torch.arange(256, dtype=torch.uint8)
    loaded = levels.float() / 255
    assert torch.equal(to_uint8(loaded + loaded - 1), levels)  # the arithmetic of the data loader
    x = torch.tensor([-1.5, -1., (10.5 - 127.5) / 127.5, 0., 1., 7.])
    assert to_uint8(x).tolist() == [0, 0, 11, 128, 255, 255]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).item() == 191


@pytest.mark.parametrize(('first', 'second'), [
    ((4, 3, 16, 16), (1, 3, 16, 16)), ((2, 3, 16, 16), (2, 1, 16, 16)), ((2, 3, 16, 16), (2, 3, 16, 1)),
    ((2, 3, 16, 16), (3, 16, 16))])
def test_images_of_other_shapes_are_never_broadcast(first, second):
    pair = noise_u8(*first), noise_u8(*second)
    pairs = PairScores()
    for compare in (psnr, mean_squared_error, ssim, pairs.add, PyramidLoss(), LPIPS(),
                    trainer.psnr):
        with pytest.raises(ValueError, match='of equal shape'):
            compare(*pair)
        with pytest.raises(ValueError, match='of equal shape'):
            compare(*reversed(pair))


@pytest.mark.parametrize('name', CASES['psnr_ssim'])
def test_psnr_and_ssim_vectors(name):
    vectors, expected = np.load(DATA / 'psnr_ssim.npz'), CASES['psnr_ssim'][name]
    pair = [torch.from_numpy(vectors[f'{name}.{side}']).permute(2, 0, 1)[None]
            for side in ('reference', 'reconstruction')]
    assert psnr(*pair).item() == pytest.approx(float(expected['psnr_uint8_range255']), abs=1e-6)
    for definition, key in (('uniform7', 'ssim_uniform7_range255'),
                            ('llamagen', 'ssim_uniform7_unit_range2_llamagen'),
                            ('gauss11', 'ssim_gaussian_sigma1.5_range255')):
        if expected[key] == 'undefined':
            with pytest.raises(ValueError, match=r'at least 11x11, got 7x7'):
                ssim(*pair, definition)
        else:
            assert ssim(*pair, definition).item() == pytest.approx(expected[key], abs=1e-6)


@pytest.mark.parametrize('definition', SSIM_DEFINITIONS)
def test_ssim_by_its_formula_window_by_window(definition):
    x_u8, y_u8 = noise_u8(2, 3, 13, 14), noise_u8(2, 3, 13, 14, seed=1)
    window, factor, data_range, _ = SSIM_DEFINITIONS[definition]
    weights, size = torch.outer(window, window), len(window)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    for image in range(2):
        values = []
        for channel in range(3):
            x, y = x_u8[image, channel].double() / 255, y_u8[image, channel].double() / 255
            for i in range(13 - size + 1):
                for j in range(14 - size + 1):
                    a, b = x[i:i + size, j:j + size], y[i:i + size, j:j + size]
                    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                    var_a = factor * (weights * (a - mean_a) ** 2).sum()
                    var_b = factor * (weights * (b - mean_b) ** 2).sum()
                    cov = factor * (weights * (a - mean_a) * (b - mean_b)).sum()
                    values.append((2 * mean_a * mean_b + c1) * (2 * cov + c2)
                                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
        assert ssim(x_u8, y_u8, definition)[image].item() == pytest.approx(np.mean(values), abs=1e-10)


def test_uniform_ssim_by_scipy():
    x_u8 = noise_u8(1, 3, 32, 24)
    y_u8 = (x_u8.int() + noise_u8(1, 3, 32, 24, seed=1).int() // 8).clamp(0, 255).byte()

    def local_mean(t):
        return uniform_filter(t, (1, 1, 7, 7))[..., 3:-3, 3:-3]
    x, y = x_u8.double().numpy(), y_u8.double().numpy()
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y, cov = (49 / 48 * (local_mean(a * b) - m * n) for a, b, m, n in (
        (x, x, mean_x, mean_x), (y, y, mean_y, mean_y), (x, y, mean_x, mean_y)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)
                / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2))).mean()
    assert ssim(x_u8, y_u8, 'uniform7').item() == pytest.approx(expected, abs=1e-9)


def test_identical_images():
    x_u8 = noise_u8(3, 3, 16, 16)
    assert psnr(x_u8, x_u8).tolist() == [math.inf] * 3
    for definition in SSIM_DEFINITIONS:
        assert ssim(x_u8, x_u8, definition).tolist() == [1.] * 3
    pairs = PairScores()
    pairs.add(x_u8, x_u8)
    assert pairs.scores() == dict(psnr=None, psnr_of_mean_mse=None, identical_images=3, ssim_gauss11=1.)
    y_u8 = noise_u8(1, 3, 16, 16, seed=1)
    pairs.add(y_u8, 255 - y_u8)
    scores = pairs.scores()
    assert scores['psnr'] == psnr(y_u8, 255 - y_u8).item() and scores['identical_images'] == 3
    assert scores['psnr_of_mean_mse'] == pytest.approx(scores['psnr'] + 10 * math.log10(4), abs=1e-9)


def test_smaller_views_are_rated_by_pixels_alone():
    calls = []

    def distance(x, y):
        calls.append((x.min() >= -1) & (y.max() <= 1))
        return (x - y).abs().flatten(1).mean(1)
    pairs = PairScores(distances={'lpips_stub': distance}, ssim_definition='uniform7')
    pairs.add(noise_u8(2, 3, 32, 32), noise_u8(2, 3, 32, 32, seed=1))
    pairs.add(noise_u8(2, 3, 8, 8), noise_u8(2, 3, 8, 8, seed=1), '_2x2')
    pairs.add(noise_u8(2, 3, 4, 4), noise_u8(2, 3, 4, 4, seed=1), '_1x1')
    assert set(pairs.scores()) == {'psnr', 'psnr_of_mean_mse', 'identical_images', 'ssim_uniform7',
                                   'lpips_stub', 'psnr_2x2', 'ssim_uniform7_2x2', 'psnr_1x1'}
    assert calls == [True]


# ---------------------------------------------------------------------------------------------- statistics
def statistics_of(features_NF, *sizes):
    statistics = FeatureStatistics(features_NF.shape[1])
    for part in features_NF.split(list(sizes) or len(features_NF)):
        statistics.add(part)
    return statistics


def test_frechet_distance_of_two_known_gaussians():
    """With diagonal covariances it is |mu1 - mu2|^2 + |sigma1 - sigma2|^2."""
    def stub(images_u8):
        return images_u8.double().flatten(2).mean(2) * torch.tensor([1., 2., 0.5])
    pairs = PairScores(features=stub, num_features=3)
    rng = np.random.RandomState(0)

    def draw(count, std, mean):  # exactly these moments
        z = torch.from_numpy(np.linalg.qr(rng.standard_normal((count, 4)))[0][:, :3])
        z = torch.linalg.qr(z - z.mean(0))[0]
        return (z - z.mean(0)) * (count - 1) ** 0.5 * torch.tensor(std) + torch.tensor(mean)
    pairs.originals.add(draw(200, [1., 2., 3.], [0., 1., 2.]))
    pairs.reconstructions.add(draw(300, [2., 2., 1.], [1., 1., 4.]))
    assert pairs.frechet_distance() == pytest.approx(1 + 4 + 1 + 4, abs=1e-3)
    assert pairs.frechet_distance((torch.zeros(3), torch.eye(3))) == pytest.approx(18 + 2, abs=1e-3)
    images = noise_u8(20, 3, 16, 16)
    pairs = PairScores(features=stub, num_features=3)
    pairs.add(images, images)
    assert abs(pairs.frechet_distance()) < 1e-6


def test_statistics_in_parts_equal_one_pass():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=rng) * 0.01 + 1000  # hopeless for E[x^2] - E[x]^2 in float32
    expected = np.cov(features.double().numpy(), rowvar=False)
    whole, parts = statistics_of(features), statistics_of(features, 1, 0, 20, 29)
    for statistics in (whole, parts):
        assert np.allclose(statistics.covariance(), expected, rtol=1e-9, atol=0)
        assert torch.allclose(statistics.mean, features.double().mean(0), rtol=1e-15)


def test_statistics_files(tmp_path):
    path = tmp_path / 'stats.npz'
    sigma = np.eye(4, dtype=np.float32)
    np.savez(path, mu=np.arange(4, dtype=np.float32), sigma=sigma, arr_0=np.zeros(3))
    mu, covariance = read_statistics(path, 4)
    assert mu.dtype == covariance.dtype == torch.float64 and mu.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r'2048 features.*\(4,\)'):
        read_statistics(path, 2048)
    with pytest.raises(ValueError, match='found none at'):
        read_statistics(tmp_path / 'nowhere.npz', 4)
    np.savez(path, mu=np.zeros(4))
    with pytest.raises(ValueError, match='sigma'):
        read_statistics(path, 4)
    for broken in (sigma + np.triu(sigma[::-1]), sigma * np.nan):
        np.savez(path, mu=np.zeros(4), sigma=broken)
        with pytest.raises(ValueError, match='symmetric'):
            read_statistics(path, 4)


# ---------------------------------------------------------------------------------------------- several ranks
def pairs_of(rows):
    images, others = noise_u8(7, 3, 16, 16), noise_u8(7, 3, 16, 16, seed=1)
    pairs = PairScores(features=lambda u8: u8.double().flatten(2).mean(2), num_features=3)
    for i in rows:
        pairs.add(images[i:i + 1], others[i:i + 1])
    return pairs


def test_three_ranks_equal_one(monkeypatch):
    """Ranks are threads here. Rank 1 has neither images nor codes; rank 2 has seen a scale of its own."""
    meeting, here, slots, results = threading.Barrier(3, timeout=60), threading.local(), [None] * 3, {}

    def allgather_object(value):
        slots[here.rank] = value
        meeting.wait()
        values = list(slots)
        meeting.wait()
        return values
    monkeypatch.setattr(dist, 'allgather_object', allgather_object)
    monkeypatch.setattr(dist, 'allreduce', lambda t: t.copy_(sum(allgather_object(t.clone()))))
    monkeypatch.setattr(dist, 'get_device', lambda: torch.device('cpu'))

    def run(rank):
        here.rank = rank
        pairs, usage = pairs_of((range(5), range(0), range(5, 7))[rank]), CodeUsage(8)
        if rank != 1:
            usage.add({'2x2': torch.tensor([[rank, rank, 3, 4]])})
        if rank == 2:
            usage.add({'10x10': torch.ones(1, 1, dtype=torch.int64)})
        pairs.reduce()
        usage.reduce()
        results[rank] = pairs, usage.counts
    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    expected = pairs_of(range(7))
    for pairs, counts in (results[rank] for rank in range(3)):
        assert pairs.scores() == expected.scores()
        assert pairs.originals.count == 7
        assert pairs.frechet_distance() == pytest.approx(expected.frechet_distance(), rel=1e-9)
        assert list(counts) == ['2x2', '10x10']
        assert counts['2x2'].tolist() == [2, 0, 2, 2, 2, 0, 0, 0]
        assert counts['10x10'].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


# ---------------------------------------------------------------------------------------------- code usage
def test_code_usage_counts_exactly():
    usage = CodeUsage(64)
    usage.add({'1x1': torch.tensor([[5], [5]]), '4x4': torch.arange(32).view(2, 16)})
    usage.add({'1x1': torch.tensor([[6], [7]]), '4x4': torch.arange(32).view(2, 16)})
    metrics = usage.metrics()
    assert metrics['usage_1x1'] == 3 / 4  # four tokens can reach four codes
    assert metrics['usage_4x4'] == 32 / 64 and metrics['usage'] == 32 / 64
    assert metrics['distinct_1x1'] == 3 and metrics['dead_1x1'] == 61 and metrics['distinct'] == 32
    assert metrics['perplexity_1x1'] == pytest.approx(2 ** 1.5, rel=1e-12)  # shares 1/2, 1/4, 1/4
    assert metrics['perplexity_4x4'] == pytest.approx(32, rel=1e-12)
    assert metrics['top10_4x4'] == 10 / 32 and metrics['top10_1x1'] == 1
    restored = CodeUsage(64)
    restored.load_state_dict(usage.state_dict())
    restored.add({'1x1': torch.tensor([[5]])})
    assert restored.counts['1x1'][5] == 3 and usage.counts['1x1'][5] == 2
    usage.clear()
    usage.reduce()
    assert usage.metrics() == {}


def test_code_usage_of_known_distributions():
    rng = torch.Generator().manual_seed(0)
    idx = torch.randint(0, 300, (40, 25), generator=rng)
    usage = CodeUsage(512)
    for part in idx.split(7):
        usage.add({'5x5': part})
    share = torch.bincount(idx.flatten()).double() / idx.numel()
    share = share[share > 0]
    assert usage.metrics()['distinct_5x5'] == len(idx.unique())
    assert usage.metrics()['usage_5x5'] == len(idx.unique()) / 512
    assert usage.metrics()['perplexity'] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-12)


# ---------------------------------------------------------------------------------------------- pictures
def test_reconstruction_rows():
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    rows = reconstruction_rows(images, {'1x1': images[..., ::4, ::4], '2x2': images.flip(0)})
    assert rows.shape == (3, 4 * 8, 4 * 8) and rows.dtype == torch.uint8
    assert torch.equal(rows[:, :8, 8:16], to_uint8(images[1]))
    assert torch.equal(rows[:, 8:16, :8], to_uint8(images[0, :, ::4, ::4].repeat_interleave(4, 1)
                                                   .repeat_interleave(4, 2)))
    assert torch.equal(rows[:, 16:24, :8], to_uint8(images[3]))
    difference = (images[0] - images[3]).abs().mul(255).clamp(0, 255)
    assert (rows[:, 24:, :8].float() - difference).abs().max() <= 0.51
    assert not reconstruction_rows(images, {'2x2': images})[:, -8:].any()


@pytest.mark.parametrize('vocab_size', [32, 1000, 4096, 8912])
def test_usage_heat_map(tmp_path, vocab_size):
    counts = {'1x1': torch.zeros(vocab_size, dtype=torch.int64), '2x2': torch.arange(vocab_size)}
    counts['1x1'][vocab_size // 2] = 3
    picture = usage_heat_map(counts)
    assert picture.dtype == torch.uint8 and picture.shape[1] == 2 * 24 + 2 and 512 <= picture.shape[2] <= 1024
    save_png(tmp_path / 'map.png', picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'map.png')), picture.permute(1, 2, 0))
    first, second = picture[:, 0].int().sum(0), picture[:, -1].int().sum(0)
    used = (first > 0).nonzero().flatten() / picture.shape[2]
    assert used.min() >= 0.49 and used.max() <= 0.54 and first.max() == second.max()
    assert (second.diff() >= -1).all()  # brighter with every larger count, but for a rounding step
