"""Scores of images: PSNR and SSIM of pairs; Frechet distance and Inception Score of sets.

The scores of sets are those of the original evaluation of ADM (guided-diffusion), which runs in TensorFlow.
Letters: B batch, N rows, F features, C classes, K chunks, 3HW image. `u8` marks 8-bit pixels (B, 3, H, W).
"""
import logging
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import linalg
from torch.nn import functional as F

import dist
from utils.image_sets import read_npz_arrays

logger = logging.getLogger(__name__)


def to_uint8(images_B3HW: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as 8 bits: 127.5 x + 127.5, clamped, rounded half up; any shape."""
    # The offset is 127.5 and another 0.5, which makes rounding down rounding half up.
    return images_B3HW.float().mul(127.5).add(128).floor().clamp(0, 255).byte()


# ---------------------------------------------------------------------------------------------- PSNR, SSIM
def check_same_shape(a: torch.Tensor, b: torch.Tensor) -> None:
    """Make sure that two batches can be compared image by image.

    Without this check, broadcasting would give a score for nearly any two shapes.

    Raises:
        ValueError: their shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f'expected two batches of equal shape, got {tuple(a.shape)} and {tuple(b.shape)}: '
                         'compare as many images, resized or cropped to one size')


def mean_squared_error(a_u8: torch.Tensor, b_u8: torch.Tensor) -> torch.Tensor:
    """(B,) float64 mean over channels and pixels, in squared grey levels.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(a_u8, b_u8)
    return (a_u8.double() - b_u8.double()).square().flatten(1).mean(1)


def decibels(mse: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of a squared error in grey levels: 10 log10(255^2 / MSE); inf where the error is 0."""
    return 10 * (255 ** 2 / mse).log10()


def psnr(images_u8: torch.Tensor, reconstructions_u8: torch.Tensor) -> torch.Tensor:
    """(B,) float64 peak signal-to-noise ratio per image in dB; inf where both are identical.

    Raises:
        ValueError: the shapes differ.
    """
    return decibels(mean_squared_error(images_u8, reconstructions_u8))


def _gaussian(size: int, sigma: float) -> torch.Tensor:
    """(size,) float64 weights of a Gaussian around the middle, with the sum 1; `sigma` is in pixels."""
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-(offset / sigma).square() / 2)
    return weights / weights.sum()


class SSIMDefinition(NamedTuple):
    """What published SSIM values differ in.

    Common to all of them: pixels in [0, 1], K1 = 0.01, K2 = 0.03, windows that lie inside the image, mean
    over positions and the channels R, G, B.
    """
    window: torch.Tensor       # one axis of the separable window, sums to 1
    covariance_factor: float   # 1 population, n / (n - 1) sample
    data_range: float
    text: str


_UNIFORM_7 = torch.full((7,), 1 / 7, dtype=torch.float64)
SSIM_DEFINITIONS = {
    'gauss11': SSIMDefinition(
        window=_gaussian(11, 1.5),
        covariance_factor=1.,
        data_range=1.,
        text='Gaussian 11x11 window, sigma 1.5, population covariance, data range 1, RGB',
    ),
    'uniform7': SSIMDefinition(
        window=_UNIFORM_7,
        covariance_factor=49 / 48,
        data_range=1.,
        text='uniform 7x7 window, sample covariance, data range 1, RGB',
    ),
    'llamagen': SSIMDefinition(
        window=_UNIFORM_7,
        covariance_factor=49 / 48,
        data_range=2.,
        text='uniform 7x7 window, sample covariance, data range 2 on pixels in [0, 1] '
             '(inflated, as in the evaluation of LlamaGen), RGB',
    ),
}


def ssim(images_u8: torch.Tensor, reconstructions_u8: torch.Tensor,
         definition: str = 'gauss11') -> torch.Tensor:
    """(B,) float64 structural similarity per image, in [-1, 1]; exactly 1 where both are identical.

    Args:
        definition: a key of `SSIM_DEFINITIONS`.
    Raises:
        ValueError: the images are smaller than the window, or the shapes differ.
    Source: Wang et al., IEEE TIP 2004.
    """
    check_same_shape(images_u8, reconstructions_u8)
    window, factor, data_range, _ = SSIM_DEFINITIONS[definition]
    height, width = images_u8.shape[-2:]
    if min(height, width) < len(window):
        raise ValueError(f'SSIM {definition!r} needs images of at least {len(window)}x{len(window)}, '
                         f'got {height}x{width}: leave ssim out of the metrics')
    window = window.to(images_u8.device)

    def local_mean(t_B3HW: torch.Tensor) -> torch.Tensor:
        # The window is separable: one axis, then the other, channel by channel.
        t_N1HW = t_B3HW.flatten(0, 1)[:, None]
        rows = F.conv2d(t_N1HW, window.view(1, 1, -1, 1))
        mean_N1hw = F.conv2d(rows, window.view(1, 1, 1, -1))
        return mean_N1hw.unflatten(0, t_B3HW.shape[:2])

    # Means, variances and the covariance of every window.
    x = images_u8.double() / 255
    y = reconstructions_u8.double() / 255
    mean_x = local_mean(x)
    mean_y = local_mean(y)
    var_x = factor * (local_mean(x * x) - mean_x * mean_x)
    var_y = factor * (local_mean(y * y) - mean_y * mean_y)
    cov = factor * (local_mean(x * y) - mean_x * mean_y)

    # SSIM is luminance times contrast and structure (Eq. 13); the constants keep dark, flat windows stable.
    c1 = (0.01 * data_range) ** 2
    c2 = (0.03 * data_range) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    denominator = (mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2)
    similarity = numerator / denominator
    return similarity.flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------- statistics
class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64 and bounded memory.

    Args:
        num_features: F.
        device: where the sums are kept.
    Source: Chan, Golub, LeVeque 1979, for the merge of two partial statistics.
    """

    def __init__(self, num_features: int, device: torch.device | str = 'cpu'):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def add(self, features_NF: torch.Tensor, first: int | None = None) -> None:
        """Add rows of features; a batch without rows is legal.

        Args:
            features_NF: (N, F) of N images.
            first: number of the first of these images, for errors; None continues from the last batch.
        Raises:
            ValueError: a feature is nan or infinite.
        """
        if len(features_NF) == 0:
            return
        features_NF = features_NF.to(self.mean)
        mean = features_NF.mean(0)

        # The mean is finite only where all features are, and is there already.
        if not mean.isfinite().all():
            first = self.count if first is None else first
            row = features_NF.isfinite().all(1).int().argmin().item()
            raise ValueError(f'expected finite features, image {first + row} gives nan or infinite '
                             'ones: check its pixels and the weights')

        # Merge the batch into what is there (Chan et al.). Sums of squares around zero would lose
        # digits where the mean is large; sums around the mean of each part do not.
        count = len(features_NF)
        total = self.count + count
        shift = mean - self.mean
        centred_NF = features_NF - mean
        scatter = centred_NF.T @ centred_NF
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def reduce(self) -> None:
        """Replace the statistics of every rank by those of all rows; every rank calls it, once at the end."""
        # The common mean comes first, since the scatter of every rank is moved to it before the sum.
        total = torch.tensor(float(self.count)).to(self.mean)
        mean = self.mean * self.count
        dist.allreduce(total)
        dist.allreduce(mean)
        mean /= total.clamp_min(1)
        shift = self.mean - mean
        self.scatter += torch.outer(shift, shift) * self.count
        dist.allreduce(self.scatter)
        self.count = int(total)
        self.mean = mean

    def covariance(self) -> torch.Tensor:
        """(F, F) unbiased sample covariance.

        Raises:
            ValueError: fewer than two rows were added.
        """
        if self.count < 2:
            raise ValueError(f'a covariance needs at least 2 images, got {self.count}: pass more images')
        return self.scatter / (self.count - 1)


def read_statistics(path: str | Path, num_features: int,
                    suffix: str = '') -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (F,) and covariance (F, F), float64, from an npz file with `mu` and `sigma`, as published for FID.

    Args:
        num_features: F of the network whose features they are compared with.
        suffix: is appended to the two names; '_s' for spatial features.
    Raises:
        ValueError: the file is not such an npz, or its numbers cannot be statistics.
    """
    shapes = {f'mu{suffix}': (num_features,), f'sigma{suffix}': (num_features, num_features)}
    wanted = ' and '.join(shapes)
    if not zipfile.is_zipfile(path):
        raise ValueError(f'expected an npz file with {wanted}, found none at {path}: check the path')
    try:
        mu, sigma = read_npz_arrays(path, shapes)
    except ValueError as error:
        raise ValueError(f'expected an npz file with {wanted} of {num_features} features, cannot use {path} '
                         f'({error}): pass reference statistics of the same network') from None
    mu = torch.from_numpy(mu.astype(np.float64))
    sigma = torch.from_numpy(sigma.astype(np.float64))

    # Damaged numbers would give a distance, too. Published files are float32, so a little asymmetry is fine.
    asymmetry = (sigma - sigma.T).abs().max() / sigma.abs().max().clamp_min(1e-300)
    if not (mu.isfinite().all() and asymmetry <= 1e-6):  # nan is not <= 1e-6, either
        raise ValueError(f'expected finite numbers and a symmetric sigma{suffix} in {path}, '
                         f'got relative asymmetry {asymmetry:.2g}: the file is damaged, download it again')
    if sigma.diagonal().min() < -1e-6 * sigma.abs().max():
        raise ValueError(f'expected a covariance as sigma{suffix} in {path}, got the variance '
                         f'{sigma.diagonal().min():.3g}: the file is damaged, compute or download it again')
    return mu, sigma


# ---------------------------------------------------------------------------------------------- distance
def frechet_distance(mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor,
                     method: str = 'eigh') -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of two Gaussians, in float64.

    Equal Gaussians may give a value a little below zero. It is computed on CUDA if a covariance lies there.

    Args:
        mu1: (F,) mean of the first Gaussian.
        sigma1: (F, F) covariance of the first Gaussian.
        mu2: (F,) mean of the second Gaussian.
        sigma2: (F, F) covariance of the second Gaussian.
        method: how to take the root: 'eigh'; or 'scipy' as in the original, which is slower and, where the
            covariances are singular, off by up to 0.1 % or fails.
    Raises:
        ValueError: the Gaussians have different numbers of features, a number is not finite, or the root of
            'scipy' is not real.
    Source: Heusel et al., arXiv 1706.08500.
    """
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f'expected statistics of equal size, got {tuple(mu1.shape)} and {tuple(mu2.shape)} '
                         'features: compare features of the same network')

    # CUDA helps eigh alone: SciPy runs on the CPU, and mps has no float64.
    device = torch.device('cpu')
    if method == 'eigh':
        if sigma1.is_cuda:
            device = sigma1.device
        elif sigma2.is_cuda:
            device = sigma2.device
    mu1 = mu1.to(device, torch.float64)
    mu2 = mu2.to(device, torch.float64)
    sigma1 = sigma1.to(device, torch.float64)
    sigma2 = sigma2.to(device, torch.float64)
    for number, statistics in enumerate(((mu1, sigma1), (mu2, sigma2)), start=1):
        if not all(t.isfinite().all() for t in statistics):
            raise ValueError(f'expected finite statistics, set {number} of 2 holds nan or infinite numbers: '
                             'compute them again')

    # Of all terms, the trace of the root alone is hard.
    trace_of_root = {'eigh': _trace_of_root, 'scipy': _trace_of_root_as_original}[method]
    trace = trace_of_root(sigma1, sigma2)
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    return distance.item()


def _trace_of_root(sigma1: torch.Tensor, sigma2: torch.Tensor) -> torch.Tensor:
    """tr sqrt(S1 S2), by eigenvalues of symmetric matrices alone.

    With R the symmetric root of S1, S1 S2 and R S2 R have the same eigenvalues, also where covariances are
    singular. The second is symmetric, and the trace of its root is the sum of the roots of these eigenvalues.
    """
    # Rounding leaves matrices a little asymmetric and their eigenvalues a little negative.
    sigma1 = (sigma1 + sigma1.T) / 2
    sigma2 = (sigma2 + sigma2.T) / 2
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    product = root @ sigma2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    return eigenvalues.clamp_min(0).sqrt().sum()


def _trace_of_root_as_original(sigma1: torch.Tensor, sigma2: torch.Tensor) -> float:
    """tr sqrt(S1 S2) by SciPy's root of a general matrix, with the original's rules where that fails."""
    sigma1 = sigma1.numpy()
    sigma2 = sigma2.numpy()
    with warnings.catch_warnings(), np.errstate(all='ignore'):
        # Warnings of singular matrices are silenced, since their consequences are checked below.
        warnings.simplefilter('ignore')
        root = linalg.sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            logger.warning('the product of covariances has no finite root: adding 1e-6 to their diagonals')
            offset = 1e-6 * np.eye(len(sigma1))
            root = linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    imaginary = np.abs(root.diagonal().imag).max()
    if not imaginary <= 1e-3:  # nan is refused, too
        raise ValueError('expected a real root of the product of covariances, got imaginary parts up to '
                         f'{imaginary:.3g}: take the method eigh, or more images than features')
    return root.diagonal().real.sum().item()


class Line(NamedTuple):
    """A straight line through distances over 1 / (number of images)."""
    at_infinity: float  # its value for infinitely many images
    slope: float


def infinite_sample_counts(count: int) -> list[int]:
    """The 15 numbers of images through whose distances `distance_at_infinity` draws its line."""
    smallest = min(5000, max(count // 10, 2))
    return np.linspace(smallest, count, 15).astype(int).tolist()


def distance_at_infinity(counts: list[int], distances: list[float]) -> Line:
    """What a Frechet distance would be for infinitely many images, by least squares.

    The bias of a distance of n images is about a constant over n. For good sets the value may be negative.

    Args:
        counts: numbers of images.
        distances: the distance of a random subset of each of these numbers.
    Source: Chong and Forsyth, arXiv 1911.07023; 15 counts as in dgm-eval.
    """
    slope, at_infinity = np.polyfit(1 / np.asarray(counts, np.float64), np.asarray(distances, np.float64), 1)
    return Line(float(at_infinity), float(slope))


# ---------------------------------------------------------------------------------------------- diversity
def vendi_score(rows_NF: torch.Tensor) -> float:
    """How many different images a set seems to have: 1 where all rows are equal, N where all are orthogonal.

    It is exp of the entropy of the eigenvalues of X X^T / N, with rows of unit length. Those of the smaller
    X^T X / N are the same but for zeros, which add nothing, so that no N x N matrix is needed.

    Raises:
        ValueError: a row has no length.
    Source: Friedman and Dieng, arXiv 2210.02410.
    """
    num_features = rows_NF.shape[1]
    gram_FF = torch.zeros(num_features, num_features, dtype=torch.float64)
    for part_nF in rows_NF.split(2000):
        part_nF = part_nF.cpu().double()
        lengths_n1 = part_nF.norm(dim=1, keepdim=True)
        if not (lengths_n1 > 0).all():
            raise ValueError('expected features that are not all zero, got an image whose are: leave vendi '
                             'out of --metrics')
        unit_nF = part_nF / lengths_n1
        gram_FF += unit_nF.T @ unit_nF
    eigenvalues = torch.linalg.eigvalsh(gram_FF / len(rows_NF))
    return torch.special.entr(eigenvalues.clamp_min(0)).sum().exp().item()


# ---------------------------------------------------------------------------------------------- classes
class InceptionScore:
    """exp(mean KL(p(c|x) || p(c))) of images that arrive in any order on any rank.

    `add` every image once, on any rank; `reduce` once; read `scores`. Only sums of p and of p ln p are kept,
    in float64, for each chunk of the file: KL(p || q) = sum p ln p - sum p ln q, and summed over the images
    of a chunk, with q their mean of p, the second term is the number of images times the entropy of q.

    Args:
        num_images: number of images on all ranks together.
        num_classes: C.
        split_size: number of images of a chunk; the last chunk may be shorter.
        device: where the sums are kept.
    Source: Salimans et al., arXiv 1606.03498.
    """

    def __init__(self, num_images: int, num_classes: int, split_size: int = 5000,
                 device: torch.device | str = 'cpu'):
        self.split_size = split_size
        self.sizes_K = torch.arange(num_images, 0, -split_size, device=device).clamp_max(split_size).double()
        self.counts_K = torch.zeros_like(self.sizes_K)
        self.p_log_p_K = torch.zeros_like(self.sizes_K)
        self.p_KC = self.sizes_K.new_zeros(len(self.sizes_K), num_classes)

    def add(self, logits_BC: torch.Tensor, first: int) -> None:
        """Add the images `first` to `first + B` of the file; a batch without images is legal.

        Args:
            logits_BC: (B, C) logits of the feature network.
            first: number of the first of these images in the file.
        Raises:
            ValueError: a logit is nan or infinite.
        """
        log_p_BC = logits_BC.to(self.p_KC).log_softmax(1)
        finite_B = log_p_BC.isfinite().all(1)
        if not finite_B.all():
            raise ValueError(f'expected finite logits, image {first + finite_B.int().argmin().item()} gives '
                             'nan or infinite ones: check its pixels and the weights')
        p_BC = log_p_BC.exp()

        # An image counts for the chunk that it lies in, whichever rank and batch it comes in.
        index_B = torch.arange(first, first + len(logits_BC), device=p_BC.device)
        chunk_B = index_B // self.split_size
        self.counts_K.index_add_(0, chunk_B, torch.ones_like(p_BC[:, 0]))
        self.p_log_p_K.index_add_(0, chunk_B, (p_BC * log_p_BC).sum(1))  # 0 where p underflows
        self.p_KC.index_add_(0, chunk_B, p_BC)

    def reduce(self) -> None:
        """Sum over ranks; every rank calls it, once."""
        for sums in (self.counts_K, self.p_log_p_K, self.p_KC):
            dist.allreduce(sums)

    def scores(self) -> tuple[float, float]:
        """The mean score of the chunks, which is the published one, and the score of all images as one chunk.

        The first depends on the order of the images, the second does not. If the images are sorted by class,
        the first is far below the second.
        """
        assert torch.equal(self.counts_K, self.sizes_K), f'{self.counts_K} images of {self.sizes_K}'

        def score(count: torch.Tensor, p_log_p: torch.Tensor, p_C: torch.Tensor) -> torch.Tensor:
            entropy = torch.special.entr(p_C / count[..., None]).sum(-1)
            return (p_log_p / count + entropy).exp()

        score_K = score(self.counts_K, self.p_log_p_K, self.p_KC)
        in_one_chunk = score(self.counts_K.sum(), self.p_log_p_K.sum(), self.p_KC.sum(0))
        return score_K.mean().item(), in_one_chunk.item()
