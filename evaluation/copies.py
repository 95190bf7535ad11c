"""Whether samples copy training images: distances of features to the nearest neighbour among them.

A diagnostic and no score: known measures of this kind miss memorisation that features do not show. Validation
images, which nobody can have copied, tell which distances are ordinary. Letters: N samples, V validation
images, T training images, F features.
"""
from typing import NamedTuple

import numpy as np
import torch

from evaluation.kernels import check_rows

NUM_NEAREST = 20          # pairs to look at
NEAR_QUANTILE = 0.01      # of the distances of validation images; a sample that is nearer is suspicious
ROWS_AT_ONCE = 2000       # whose distances to a part of the training images are in memory: 80 MB of float64
PART_OF_BANK = 5000


class Nearest(NamedTuple):
    """The nearest training image of every row."""
    index_N: torch.Tensor     # int64, number of the training image
    distance_N: torch.Tensor  # float64, not squared


class Copies(NamedTuple):
    """How near samples and validation images come to training images."""
    median_sample: float                     # distance of a sample to its nearest training image
    median_validation: float                 # the same of validation images
    share_nearer: float                      # of samples that are nearer than 99 % of the validation images
    authentic: float                         # share of samples, see `authentic_share`
    pairs: list[tuple[int, int, float]]      # the nearest (sample, training image, distance), ascending


def nearest_neighbours(rows_NF: torch.Tensor, bank_TF: torch.Tensor, device: torch.device | str | None = None,
                       is_same: bool = False) -> Nearest:
    """The nearest row of `bank_TF` for every row of `rows_NF`, by Euclidean distance in float64.

    Args:
        device: where distances are computed, block by block; None computes them where the rows are.
        is_same: both are the same set, and no row is its own neighbour.
    """
    device = device or rows_NF.device
    indices = []
    distances = []
    for first in range(0, len(rows_NF), ROWS_AT_ONCE):
        x_nF = rows_NF[first:first + ROWS_AT_ONCE].to(device, torch.float64)
        best_n = torch.full((len(x_nF),), torch.inf, dtype=torch.float64, device=device)
        index_n = torch.zeros(len(x_nF), dtype=torch.int64, device=device)
        for begin in range(0, len(bank_TF), PART_OF_BANK):
            y_tF = bank_TF[begin:begin + PART_OF_BANK].to(device, torch.float64)
            norms_n1 = x_nF.square().sum(1, keepdim=True)
            distance_nt = norms_n1 - 2 * (x_nF @ y_tF.T) + y_tF.square().sum(1)
            # The distance of a row to itself is none to a neighbour.
            if is_same:
                own_n = torch.arange(first, first + len(x_nF), device=device) - begin
                is_here_n = (own_n >= 0) & (own_n < len(y_tF))
                rows_here = is_here_n.nonzero()[:, 0]
                distance_nt[rows_here, own_n[rows_here]] = torch.inf

            # The nearest row so far, of this part of the bank or of an earlier one.
            found_n, where_n = distance_nt.min(1)
            is_nearer_n = found_n < best_n
            best_n = torch.where(is_nearer_n, found_n, best_n)
            index_n = torch.where(is_nearer_n, where_n + begin, index_n)
        indices.append(index_n.cpu())
        distances.append(best_n.clamp_min(0).sqrt().cpu())
    return Nearest(torch.cat(indices), torch.cat(distances))


def authentic_share(nearest: Nearest, own_distance_T: torch.Tensor) -> float:
    """Share of samples that are farther from their nearest training image than that one is from its own
    nearest neighbour within the training images; a sample that is nearer may be a copy.

    Args:
        nearest: of the samples among the training images.
        own_distance_T: distance of every training image to its nearest other one.
    Source: Alaa et al., arXiv 2102.08921.
    """
    is_authentic_N = nearest.distance_N > own_distance_T[nearest.index_N]
    return is_authentic_N.double().mean().item()


def find_copies(sample_NF: torch.Tensor, validation_VF: torch.Tensor, train_TF: torch.Tensor,
                device: torch.device | str | None = None) -> Copies:
    """Compare samples and validation images with the training images.

    Args:
        sample_NF: features of the samples.
        validation_VF: of images like the training images, but not among them.
        train_TF: of the training images, at least two.
        device: see `nearest_neighbours`.
    Raises:
        ValueError: a set has fewer than two rows, a feature is not finite, or the sets differ in F.
    """
    check_rows(sample_NF, train_TF)
    check_rows(validation_VF, train_TF)
    of_sample = nearest_neighbours(sample_NF, train_TF, device)
    of_validation = nearest_neighbours(validation_VF, train_TF, device)
    of_train = nearest_neighbours(train_TF, train_TF, device, is_same=True)

    near = np.quantile(of_validation.distance_N.numpy(), NEAR_QUANTILE)
    order_N = of_sample.distance_N.argsort()
    pairs = []
    for sample in order_N[:NUM_NEAREST].tolist():
        pairs.append((sample, of_sample.index_N[sample].item(), of_sample.distance_N[sample].item()))
    return Copies(
        median_sample=float(np.median(of_sample.distance_N.numpy())),
        median_validation=float(np.median(of_validation.distance_N.numpy())),
        share_nearer=(of_sample.distance_N < near).double().mean().item(),
        authentic=authentic_share(of_sample, of_train.distance_N),
        pairs=pairs,
    )
