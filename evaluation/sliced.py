"""MIND: the distance of two sets of features along random directions.

Along a direction each set is a list of numbers. Sorted, the two lists pair up as the cheapest transport
between them does, so that no kernel and no covariance is needed. Letters: N and M rows, n rows that are
compared, F features, K directions.
"""
from typing import NamedTuple

import torch

from evaluation.kernels import check_rows

MIND_DIRECTIONS = 1000
MIND_SEED = 2020           # of rows and directions, as in torch-fidelity
FACTOR_PER_FEATURE = 3.    # the authors' scale, found by experiment: near that of FID
DIRECTIONS_AT_ONCE = 100   # 40 MB for two sets of 50,000 rows


class Mind(NamedTuple):
    """A distance along random directions."""
    value: float
    error: float  # its standard error over the directions alone; other images would add to it
    count: int    # n, images of each set that were compared


def mind(sample_NF: torch.Tensor, reference_MF: torch.Tensor, count: int | None = None,
         num_directions: int = MIND_DIRECTIONS, seed: int = MIND_SEED) -> Mind:
    """3 F times the mean over unit vectors u of W2^2, the squared Wasserstein distance of x.u and y.u.

    Rows and directions are drawn by one generator, as in torch-fidelity: rows of the sample if it has too
    many, then rows of the reference, then the directions.

    Args:
        count: n, at most so many rows of each set are compared; None takes as many as the smaller set has.
    Raises:
        ValueError: a set has fewer than two rows, a feature is not finite, or the sets differ in F.
    Source: arXiv 2605.06797; the scale is that of torch-fidelity.
    """
    check_rows(sample_NF, reference_MF)
    smaller = min(len(sample_NF), len(reference_MF))
    count = min(count or smaller, smaller)
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for rows in (sample_NF, reference_MF):
        if len(rows) > count:
            rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
        sets.append(rows.cpu().double())
    num_features = sample_NF.shape[1]
    directions_KF = torch.randn(num_directions, num_features, generator=generator).double()
    directions_KF /= directions_KF.norm(dim=1, keepdim=True)

    # W2^2 of two lists of equal length is the mean squared difference of the sorted lists.
    parts = [_squared_distances(*sets, part) for part in directions_KF.split(DIRECTIONS_AT_ONCE)]
    squared_K = torch.cat(parts)
    scaled_K = FACTOR_PER_FEATURE * num_features * squared_K
    error = scaled_K.std() / num_directions ** 0.5
    return Mind(scaled_K.mean().item(), error.item(), count)


def _squared_distances(x_nF: torch.Tensor, y_nF: torch.Tensor, directions_KF: torch.Tensor) -> torch.Tensor:
    """(K,) W2^2 along each direction."""
    x_Kn = (directions_KF @ x_nF.T).sort(dim=1).values
    y_Kn = (directions_KF @ y_nF.T).sort(dim=1).values
    return (x_Kn - y_Kn).square().mean(1)
