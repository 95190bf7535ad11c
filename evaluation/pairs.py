"""Scores of (original, reconstruction) pairs, gathered over batches and ranks.

Letters: B batch, N images. `u8` marks 8-bit pixels (B, 3, H, W).
"""
from collections.abc import Callable

import torch

import dist
from evaluation.metrics import (
    SSIM_DEFINITIONS,
    FeatureStatistics,
    check_same_shape,
    decibels,
    frechet_distance,
    mean_squared_error,
    ssim,
)


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
        self.with_psnr = with_psnr
        self.ssim_definition = ssim_definition
        self.distances = distances or {}
        self.features = features
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
        Raises:
            ValueError: the shapes of the two differ.
        """
        check_same_shape(originals_u8, reconstructions_u8)
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
