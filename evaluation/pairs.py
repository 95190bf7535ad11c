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

    Values are gathered per image, in the order of ranks, so that scores do not depend on the number of ranks.

    Args:
        with_psnr: whether PSNR is computed.
        ssim_definition: a key of `SSIM_DEFINITIONS`; empty leaves SSIM out.
        distances: name -> network that maps two batches in [-1, 1] to (B,), such as LPIPS.
        features: network that maps 8-bit images to (B, F), for the Frechet distance; None leaves it out.
        num_features: F.
        device: where the statistics of features are kept.
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
            originals_u8: uint8 (B, 3, H, W).
            reconstructions_u8: uint8 (B, 3, H, W).
            suffix: is appended to the names of the scores, and marks smaller copies of images that are rated
                in full size, too. Such copies get no distances and features, and no SSIM where its window is
                larger than they are.
        Raises:
            ValueError: the shapes of the two batches differ.
        """
        check_same_shape(originals_u8, reconstructions_u8)
        values = {}
        if self.with_psnr:
            values['mse'] = mean_squared_error(originals_u8, reconstructions_u8)
        definition = SSIM_DEFINITIONS.get(self.ssim_definition)
        if definition:
            is_too_small = min(originals_u8.shape[-2:]) < len(definition.window)
            if not (suffix and is_too_small):
                similarity = ssim(originals_u8, reconstructions_u8, self.ssim_definition)
                values[f'ssim_{self.ssim_definition}'] = similarity

        # The networks were trained on images in full size.
        if not suffix:
            originals = originals_u8.float() / 127.5 - 1
            reconstructions = reconstructions_u8.float() / 127.5 - 1
            for name, distance in self.distances.items():
                values[name] = distance(originals, reconstructions).double()
            if self.features is not None:
                self.originals.add(self.features(originals_u8))
                self.reconstructions.add(self.features(reconstructions_u8))
        for name, value_B in values.items():
            self.values.setdefault(name + suffix, []).append(value_B.cpu())

    def reduce(self) -> None:
        """Gather what all ranks have seen; every rank calls it, once."""
        own = {name: torch.cat(values) for name, values in self.values.items()}
        parts = dist.allgather_object(own)

        # A rank without images has no names, so the names come from the rank with the most of them.
        names = max(parts, key=len)
        self.values = {}
        for name in names:
            self.values[name] = [part[name] for part in parts if part]
        if self.features is not None:
            self.originals.reduce()
            self.reconstructions.reduce()

    def scores(self) -> dict[str, float | int | None]:
        """The scores by name, which are means over the images; None where no image counts for a mean.

        PSNR is infinite for identical images, so `psnr` is the mean over the other ones. Images in full size
        also have `psnr_of_mean_mse`, and `identical_images`, their number.
        """
        def mean(value_N: torch.Tensor) -> float | None:
            return value_N.mean().item() if len(value_N) else None

        scores: dict[str, float | int | None] = {}
        for name, values in self.values.items():
            value_N = torch.cat(values)
            if not name.startswith('mse'):
                scores[name] = mean(value_N)
                continue

            # PSNR per image, then the mean, as published; the PSNR of the mean error is another number.
            differing = value_N[value_N > 0]
            scores[name.replace('mse', 'psnr')] = mean(decibels(differing))
            if name == 'mse':
                scores['psnr_of_mean_mse'] = decibels(value_N.mean()).item() if len(differing) else None
                scores['identical_images'] = len(value_N) - len(differing)
        return scores

    def frechet_distance(self, reference: tuple[torch.Tensor, torch.Tensor] | None = None) -> float:
        """Frechet distance between the features of the reconstructions and a reference.

        Args:
            reference: (mean (F,), covariance (F, F)); None takes those of the originals.
        """
        mean, covariance = reference or (self.originals.mean, self.originals.covariance())
        return frechet_distance(
            mean,
            covariance,
            self.reconstructions.mean,
            self.reconstructions.covariance(),
        )
