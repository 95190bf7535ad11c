"""Precision and recall of sets of features, as the original evaluation of ADM defines them.

The manifold of a set is the union of balls around its points, each with a radius up to the k-th neighbour of
its point. Precision is the fraction of samples on the manifold of the reference, recall that of reference
images on the manifold of the samples. Read it from `precision_recall`, the last function. The N x M distances
never lie in memory together: `_blocks` cuts both sets, `_slices` cuts the rows of a block once more.
Letters: N and M rows, n rows of a slice, F features.
"""
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from utils.misc import full_precision


class PrecisionRecall(NamedTuple):
    """Two fractions in [0, 1]."""
    precision: float  # fraction of the samples that lie on the manifold of the reference
    recall: float     # fraction of the reference images that lie on the manifold of the samples


Slices = Iterator[tuple[slice, torch.Tensor]]  # (rows of a block, their distances to all columns)
SLICE = 2 ** 21                                # number of distances in a slice: 8 MB of float32


def _half_distances(x_NF: torch.Tensor, y_MF: torch.Tensor) -> Slices:
    """Squared distances by the original's arithmetic in float16, then as float32.

    Inputs, squares, norms, products and their sums are rounded to float16; sums over F are in float32.

    Raises:
        OverflowError: a distance is not finite.
    """
    def norms(t_NF: torch.Tensor) -> torch.Tensor:
        return (t_NF * t_NF).sum(1, dtype=torch.float32).half()

    y_MF = y_MF.half()
    norms_M = torch.cat([norms(part_MF) for part_MF in y_MF.split(1024)])
    wide = torch.float32 if y_MF.device.type == 'cpu' else torch.float16  # CUDA sums in float32 by itself
    y_MF = y_MF.to(wide)
    for rows in _slices(x_NF, y_MF):
        x_nF = x_NF[rows].half()
        product_nM = (x_nF.to(wide) @ y_MF.T).half()

        # |x - y|^2 = |x|^2 - 2 x.y + |y|^2. Upstream parity: where 2 x.y alone overflows, -inf becomes 0 here
        # and nothing is redone in float32.
        distance_nM = (norms(x_nF)[:, None] - 2 * product_nM + norms_M).clamp_min_(0).float()
        if not distance_nM.isfinite().all():
            raise OverflowError
        yield rows, distance_nM


def _float_distances(x_NF: torch.Tensor, y_MF: torch.Tensor) -> Slices:
    """Squared distances in float32."""
    norms_M = torch.cat([part_MF.square().sum(1) for part_MF in y_MF.split(1024)])
    for rows in _slices(x_NF, y_MF):
        x_nF = x_NF[rows]
        norms_n1 = x_nF.square().sum(1, keepdim=True)
        product_nM = x_nF @ y_MF.T
        distance_nM = norms_n1 - 2 * product_nM + norms_M
        yield rows, distance_nM.clamp_min_(0)


def _slices(x_NF: torch.Tensor, y_MF: torch.Tensor) -> list[slice]:
    """The rows of x in parts whose distances to all of y are at most `SLICE` numbers."""
    step = max(SLICE // len(y_MF), 1)
    return [slice(begin, begin + step) for begin in range(0, len(x_NF), step)]


def _fold_block(x_NF: torch.Tensor, y_MF: torch.Tensor, mode: str, fold: Callable[..., Any],
                *args: torch.Tensor) -> Any:
    """What `fold(slices, *args)` returns for the distances between the rows of a block and its columns.

    As in the original, a block that overflows in float16 is computed again as a whole in float32: `fold` is
    then called a second time, so it must not change its arguments.
    """
    with full_precision():
        if mode == 'adm':
            with suppress(OverflowError):
                return fold(_half_distances(x_NF, y_MF), *args)
        return fold(_float_distances(x_NF, y_MF), *args)


def _merge_nearest(slices: Slices, nearest: torch.Tensor) -> torch.Tensor:
    """The smallest distances of every row, (N, k + 1) ascending: `nearest` so far, merged with a block."""
    count = nearest.shape[1]
    merged = torch.empty_like(nearest)
    for rows, distance_nM in slices:
        num_here = min(count, distance_nM.shape[1])
        nearest_here = distance_nM.topk(num_here, largest=False).values
        both = torch.cat([nearest[rows], nearest_here], 1)
        merged[rows] = both.topk(count, largest=False).values
    return merged


def _find_covered(slices: Slices, radii_N: torch.Tensor,
                  radii_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows within the radius of some column, (N,) bool, and columns within the radius of some row, (M,)."""
    covered_N = torch.zeros_like(radii_N, dtype=torch.bool)
    covered_M = torch.zeros_like(radii_M, dtype=torch.bool)
    for rows, distance_nM in slices:
        covered_N[rows] = (distance_nM <= radii_M).any(1)
        covered_M |= (distance_nM <= radii_N[rows, None]).any(0)
    return covered_N, covered_M


def _blocks(points_NF: torch.Tensor, block: int,
            device: torch.device | str | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, float32 features of these rows on the device) for every block of points."""
    for begin in range(0, len(points_NF), block):
        rows = slice(begin, begin + block)
        yield rows, points_NF[rows].to(device=device, dtype=torch.float32)


def manifold_radii(points_NF: torch.Tensor, mode: str = 'adm', k: int = 3, block: int = 10_000,
                   device: torch.device | str | None = None) -> torch.Tensor:
    """(N,) float32 squared distance of every point to its k-th neighbour; see `precision_recall`."""
    radii = []
    for _, x in _blocks(points_NF, block, device):
        # The nearest of the k + 1 points is the point itself.
        nearest = x.new_full((len(x), k + 1), torch.inf)
        for _, y in _blocks(points_NF, block, device):
            nearest = _fold_block(x, y, mode, _merge_nearest, nearest)
        radii.append(nearest[:, k])
    return torch.cat(radii)


def manifold_coverage(reference_NF: torch.Tensor, radii_N: torch.Tensor, sample_MF: torch.Tensor,
                      radii_M: torch.Tensor, mode: str = 'adm', block: int = 10_000,
                      device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which reference points lie on the manifold of the samples, (N,) bool, and the other way round, (M,).

    A point lies on the manifold of a set if it lies in the ball around some point of that set.
    """
    covered_N = torch.zeros_like(radii_N, dtype=torch.bool)
    covered_M = torch.zeros_like(radii_M, dtype=torch.bool)
    for rows, x in _blocks(reference_NF, block, device):
        for columns, y in _blocks(sample_MF, block, device):
            rows_covered, columns_covered = _fold_block(x, y, mode, _find_covered, radii_N[rows],
                                                        radii_M[columns])
            covered_N[rows] |= rows_covered
            covered_M[columns] |= columns_covered
    return covered_N, covered_M


def precision_recall(reference_NF: torch.Tensor, sample_MF: torch.Tensor, mode: str = 'adm', k: int = 3,
                     block: int = 10_000, device: torch.device | str | None = None) -> PrecisionRecall:
    """Precision and recall of samples; see the top of this file.

    Args:
        reference_NF: float32 features of the reference images; all of them are used.
        sample_MF: float32 features of the samples; all of them are used.
        mode: 'adm' repeats the original, whose distances are float16 and whose scores are therefore slightly
            higher; 'fp32' is in float32.
        k: which neighbour the radius of a ball reaches.
        block: rows and columns of a block of distances; scores depend on it only where float16 overflows.
        device: where distances are computed, block by block; None computes them where the features are.
    Raises:
        ValueError: a set has k points or fewer, a feature is not finite, or the sets differ in F.
    Source: Kynkaanniemi et al., arXiv 1904.06991.
    """
    assert mode in ('adm', 'fp32'), mode
    if reference_NF.shape[1] != sample_MF.shape[1]:
        raise ValueError(f'expected features of one network, got {reference_NF.shape[1]} of the reference, '
                         f'{sample_MF.shape[1]} of the samples: compute both anew')
    for name, points in (('reference', reference_NF), ('sample', sample_MF)):
        if len(points) <= k:
            raise ValueError(f'precision and recall need at least {k + 1} {name} images, got {len(points)}: '
                             'pass more images, or leave them out of the metrics')
        # The extremes are finite only where all features are, and need no copy of all points.
        if not torch.stack(points.aminmax()).isfinite().all():
            raise ValueError(f'expected finite features, {name} image '
                             f'{points.isfinite().all(1).int().argmin().item()} has nan or infinite ones: '
                             'check its pixels and the weights')

    # The radii of each set define its manifold (Eq. 1 and 2 of the paper), which covers points of the other.
    settings = dict(mode=mode, block=block, device=device)
    radii_N = manifold_radii(reference_NF, k=k, **settings)
    radii_M = manifold_radii(sample_MF, k=k, **settings)
    covered_N, covered_M = manifold_coverage(reference_NF, radii_N, sample_MF, radii_M, **settings)
    return PrecisionRecall(
        precision=covered_M.double().mean().item(),
        recall=covered_N.double().mean().item(),
    )
