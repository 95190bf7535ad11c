"""Scores of images: PSNR, SSIM, streaming statistics of features and the Frechet distance between them.

Letters: B batch, N rows, F features, 3HW image. `u8` marks 8-bit pixels (B, 3, H, W).
"""
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import dist


def to_uint8(images_B3HW: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as 8 bits: 127.5 x + 127.5, clamped, rounded half up."""
    return images_B3HW.float().mul(127.5).add(128).floor().clamp(0, 255).byte()


# ---------------------------------------------------------------------------------------------- PSNR, SSIM
def mean_squared_error(a_u8: torch.Tensor, b_u8: torch.Tensor) -> torch.Tensor:
    """(B,) float64 mean over channels and pixels, in squared grey levels."""
    return (a_u8.double() - b_u8.double()).square().flatten(1).mean(1)


def decibels(mse: torch.Tensor) -> torch.Tensor:
    """PSNR of a squared error in grey levels: 10 log10(255^2 / MSE); inf where it is 0."""
    return 10 * (255 ** 2 / mse).log10()


def psnr(images_u8: torch.Tensor, reconstructions_u8: torch.Tensor) -> torch.Tensor:
    """(B,) float64 peak signal-to-noise ratio per image in dB; inf where both are identical."""
    return decibels(mean_squared_error(images_u8, reconstructions_u8))


def _gaussian(size: int, sigma: float) -> torch.Tensor:
    weights = torch.exp(-torch.arange(size, dtype=torch.float64).sub(size // 2).div(sigma).square() / 2)
    return weights / weights.sum()


class SSIMDefinition(NamedTuple):
    """What published SSIM values differ in. All: pixels in [0, 1], K1 0.01, K2 0.03, windows that lie inside
    the image, mean over positions and the channels R, G, B."""
    window: torch.Tensor       # one axis of the separable window, sums to 1
    covariance_factor: float   # 1 population, n / (n - 1) sample
    data_range: float
    text: str


SSIM_DEFINITIONS = {
    'gauss11': SSIMDefinition(_gaussian(11, 1.5), 1., 1.,
                              'Gaussian 11x11 window, sigma 1.5, population covariance, data range 1, RGB'),
    'uniform7': SSIMDefinition(torch.full((7,), 1 / 7, dtype=torch.float64), 49 / 48, 1.,
                               'uniform 7x7 window, sample covariance, data range 1, RGB'),
    'llamagen': SSIMDefinition(torch.full((7,), 1 / 7, dtype=torch.float64), 49 / 48, 2.,
                               'uniform 7x7 window, sample covariance, data range 2 on pixels in [0, 1] '
                               '(inflated, as in the evaluation of LlamaGen), RGB'),
}


def ssim(images_u8: torch.Tensor, reconstructions_u8: torch.Tensor,
         definition: str = 'gauss11') -> torch.Tensor:
    """(B,) float64 structural similarity per image, in [-1, 1]; exactly 1 where both are identical.

    Args:
        definition: a key of `SSIM_DEFINITIONS`.
    Raises:
        ValueError: the images are smaller than the window.
    Source: Wang et al., IEEE TIP 2004.
    """
    window, factor, data_range, _ = SSIM_DEFINITIONS[definition]
    height, width = images_u8.shape[-2:]
    if min(height, width) < len(window):
        raise ValueError(f'SSIM {definition!r} needs images of at least {len(window)}x{len(window)}, '
                         f'got {height}x{width}: leave ssim out of the metrics')
    window = window.to(images_u8.device)

    def local_mean(t_B3HW: torch.Tensor) -> torch.Tensor:
        t_N1HW = t_B3HW.flatten(0, 1)[:, None]
        rows = F.conv2d(t_N1HW, window.view(1, 1, -1, 1))
        return F.conv2d(rows, window.view(1, 1, 1, -1)).unflatten(0, t_B3HW.shape[:2])

    x, y = images_u8.double() / 255, reconstructions_u8.double() / 255
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x = factor * (local_mean(x * x) - mean_x * mean_x)
    var_y = factor * (local_mean(y * y) - mean_y * mean_y)
    cov = factor * (local_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) \
        / ((mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2))
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

    def add(self, features_NF: torch.Tensor) -> None:
        """Take in rows of features; none at all is legal.

        Raises:
            ValueError: a feature is nan or infinite.
        """
        if len(features_NF) == 0:
            return
        features_NF = features_NF.to(self.mean)
        finite_N = features_NF.isfinite().all(1)
        if not finite_N.all():
            raise ValueError(f'expected finite features, image {self.count + finite_N.int().argmin().item()} '
                             'gives nan or infinite ones: check its pixels and the weights')
        mean = features_NF.mean(0)
        shifted_NF = features_NF - mean
        self._merge(len(features_NF), mean, shifted_NF.T @ shifted_NF)

    def merge(self, other: 'FeatureStatistics') -> None:
        """Take in the rows that `other` has seen."""
        if other.count:
            self._merge(other.count, other.mean, other.scatter)

    def _merge(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total, shift = self.count + count, mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def reduce(self) -> None:
        """Replace the statistics of every rank by those of all rows; every rank calls it, once at the end."""
        total, mean = torch.tensor(float(self.count)).to(self.mean), self.mean * self.count
        dist.allreduce(total)
        dist.allreduce(mean)
        mean /= total.clamp_min(1)
        shift = self.mean - mean
        self.scatter += torch.outer(shift, shift) * self.count
        dist.allreduce(self.scatter)
        self.count, self.mean = int(total), mean

    def covariance(self) -> torch.Tensor:
        """(F, F) unbiased sample covariance.

        Raises:
            ValueError: fewer than two rows were added.
        """
        if self.count < 2:
            raise ValueError(f'a covariance needs at least 2 images, got {self.count}: pass more images')
        return self.scatter / (self.count - 1)


def read_statistics(path: str | Path, num_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (F,) and covariance (F, F) of an npz file with `mu` and `sigma`, as published for FID.

    Args:
        num_features: F of the network that they are compared with.

    Raises:
        ValueError: the file is not such an npz, or its numbers cannot be statistics.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f'expected an npz file with mu and sigma, found none at {path}: check the path')
    try:
        with np.load(path) as archive:
            mu, sigma = (torch.from_numpy(archive[key].astype(np.float64)) for key in ('mu', 'sigma'))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f'expected an npz file with mu and sigma, cannot read {path} ({error}): '
                         'pass reference statistics') from None
    if mu.shape != (num_features,) or sigma.shape != (num_features, num_features):
        raise ValueError(f'expected mu and sigma of {num_features} features in {path}, got shapes '
                         f'{tuple(mu.shape)} and {tuple(sigma.shape)}: pass statistics of the same network')
    asymmetry = (sigma - sigma.T).abs().max() / sigma.abs().max().clamp_min(1e-300)
    if not (mu.isfinite().all() and asymmetry <= 1e-6):  # false for nan, too
        raise ValueError(f'expected finite numbers and a symmetric sigma in {path}, '
                         f'got relative asymmetry {asymmetry:.2g}: the file is damaged, download it again')
    return mu, sigma


def frechet_distance(mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor,
                     sigma2: torch.Tensor) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of two Gaussians, in float64.

    With R the symmetric root of S1, the trace of sqrt(S1 S2) is that of sqrt(R S2 R): singular covariances
    need no special rule. Equal Gaussians may give a value a little below zero.

    Raises:
        ValueError: the two have different numbers of features.
    Source: Heusel et al., arXiv 1706.08500.
    """
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f'expected statistics of equal size, got {tuple(mu1.shape)} and {tuple(mu2.shape)} '
                         'features: compare features of the same network')
    mu1, sigma1, mu2, sigma2 = (t.to('cpu', torch.float64) for t in (mu1, sigma1, mu2, sigma2))
    sigma1, sigma2 = (sigma1 + sigma1.T) / 2, (sigma2 + sigma2.T) / 2
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    product = root @ sigma2 @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root).item()


# ---------------------------------------------------------------------------------------------- pairs
class PairScores:
    """Scores of (original, reconstruction) pairs: `add` batches on every rank, `reduce` once, read `scores`.

    Values are gathered per image, in the order of ranks, so that the scores do not depend on their number.

    Args:
        with_psnr: whether PSNR is wanted.
        ssim_definition: a key of `SSIM_DEFINITIONS`; empty leaves SSIM out.
        distances: name -> network that maps two batches in [-1, 1] to (B,), such as LPIPS.
        features: network that maps 8-bit images to (B, F), for the Frechet distance; None leaves it out.
        num_features: F. device: where their statistics are kept.
    """

    def __init__(self, with_psnr: bool = True, ssim_definition: str = 'gauss11',
                 distances: dict[str, Callable] | None = None, features: Callable | None = None,
                 num_features: int = 0, device: torch.device | str = 'cpu'):
        self.with_psnr, self.ssim_definition = with_psnr, ssim_definition
        self.distances, self.features = distances or {}, features
        if features is not None:
            self.originals = FeatureStatistics(num_features, device)
            self.reconstructions = FeatureStatistics(num_features, device)
        self.values: dict[str, list[torch.Tensor]] = {}  # (B,) float64 of every batch, by name

    @torch.no_grad()
    def add(self, originals_u8: torch.Tensor, reconstructions_u8: torch.Tensor, suffix: str = '') -> None:
        """Rate a batch.

        Args:
            suffix: marks smaller views of images that are rated in full, too: appended to the names. These
                views have no distances and features, and no SSIM where its window is larger than they are.
        """
        pair = originals_u8, reconstructions_u8
        values = {}
        if self.with_psnr:
            values['mse'] = mean_squared_error(*pair)
        definition = SSIM_DEFINITIONS.get(self.ssim_definition)
        if definition and not (suffix and min(originals_u8.shape[-2:]) < len(definition.window)):
            values[f'ssim_{self.ssim_definition}'] = ssim(*pair, self.ssim_definition)
        if not suffix:
            for name, distance in self.distances.items():
                values[name] = distance(*(t_u8.float() / 127.5 - 1 for t_u8 in pair)).double()
            if self.features is not None:
                self.originals.add(self.features(originals_u8))
                self.reconstructions.add(self.features(reconstructions_u8))
        for name, value_B in values.items():
            self.values.setdefault(name + suffix, []).append(value_B.cpu())

    def reduce(self) -> None:
        """Gather what all ranks have seen; every rank calls it, once."""
        parts = dist.allgather_object({name: torch.cat(values) for name, values in self.values.items()})
        self.values = {name: [part[name] for part in parts if part]  # a rank without images has no names
                       for name in max(parts, key=len)}
        if self.features is not None:
            self.originals.reduce()
            self.reconstructions.reduce()

    def scores(self) -> dict[str, float | int | None]:
        """Means over the images by name; None where there is none.

        For PSNR: `psnr` over the images that are not identical; of images in full also `psnr_of_mean_mse` and
        the number of `identical_images`.
        """
        def mean(value_N: torch.Tensor) -> float | None:
            return value_N.mean().item() if len(value_N) else None

        scores: dict[str, float | int | None] = {}
        for name, values in self.values.items():
            value_N = torch.cat(values)
            if not name.startswith('mse'):
                scores[name] = mean(value_N)
                continue
            differing = value_N[value_N > 0]
            scores[name.replace('mse', 'psnr')] = mean(decibels(differing))
            if name == 'mse':
                scores['psnr_of_mean_mse'] = decibels(value_N.mean()).item() if len(differing) else None
                scores['identical_images'] = len(value_N) - len(differing)
        return scores

    def frechet_distance(self, reference: tuple[torch.Tensor, torch.Tensor] | None = None) -> float:
        """Of the reconstructions' features to a reference (mean, covariance), by default the originals'."""
        reference = reference or (self.originals.mean, self.originals.covariance())
        return frechet_distance(*reference, self.reconstructions.mean, self.reconstructions.covariance())
