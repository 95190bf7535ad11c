"""Precision and recall of sets of features, as the original evaluation of ADM defines them; density and
coverage.

The manifold of a set is the union of balls around its points, each with a radius up to the k-th neighbour of
its point. Precision is the fraction of samples on the manifold of the reference, recall that of reference
images on the manifold of the samples. Read it from `precision_recall`, or from `density_coverage` for PRDC,
the last two functions. The N x M distances never lie in memory together: `_blocks` cuts both sets, `_slices`
cuts the rows of a block once more. Letters: N and M rows, n rows of a slice, F features.
"""
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from evaluation.kernels import check_rows
from utils.misc import full_precision


class PrecisionRecall(NamedTuple):
    """Two fractions in [0, 1]."""
    precision: float  # fraction of the samples that lie on the manifold of the reference
    recall: float     # fraction of the reference images that lie on the manifold of the samples


class Prdc(NamedTuple):
    """Precision and recall with a strict comparison, and their counterparts that outliers change little."""
    precision: float  # fraction of the samples within a ball of the reference
    recall: float     # fraction of the reference images within a ball of the samples
    density: float    # balls of the reference around a sample, divided by k; 1 on average for equal laws
    coverage: float   # fraction of the balls of the reference that hold a sample


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


def _double_distances(x_NF: torch.Tensor, y_MF: torch.Tensor) -> Slices:
    """Squared distances in float64, then as float32.

    Only these are the same in both directions, and equal for equal pairs in any block, which decides about a
    point that lies on the edge of a ball: after rounding, nothing is left of what the order of a sum changes.
    """
    y_MF = y_MF.double()
    norms_M = y_MF.square().sum(1)
    for rows in _slices(x_NF, y_MF):
        x_nF = x_NF[rows].double()
        norms_n1 = x_nF.square().sum(1, keepdim=True)
        product_nM = x_nF @ y_MF.T
        distance_nM = norms_n1 - 2 * product_nM + norms_M
        yield rows, distance_nM.clamp_min_(0).float()


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
        if mode == 'fp64':
            return fold(_double_distances(x_NF, y_MF), *args)
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


def _count_within(slices: Slices, radii_N: torch.Tensor,
                  radii_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For a block of reference points as rows and samples as columns, with a strict comparison: balls of rows
    around each column, (M,) int64; rows whose ball holds a column, (N,) bool; rows in the ball of some
    column, (N,) bool.
    """
    balls_M = torch.zeros_like(radii_M, dtype=torch.int64)
    holds_N = torch.zeros_like(radii_N, dtype=torch.bool)
    covered_N = torch.zeros_like(radii_N, dtype=torch.bool)
    for rows, distance_nM in slices:
        is_in_ball_nM = distance_nM < radii_N[rows, None]
        balls_M += is_in_ball_nM.sum(0)
        holds_N[rows] = is_in_ball_nM.any(1)
        covered_N[rows] = (distance_nM < radii_M).any(1)
    return balls_M, holds_N, covered_N


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


def _check_points(reference_NF: torch.Tensor, sample_MF: torch.Tensor, k: int) -> None:
    """Make sure that both sets have manifolds that can be compared.

    Raises:
        ValueError: a set has k points or fewer, a feature is not finite, or the sets differ in F.
    """
    for name, points in (('reference', reference_NF), ('sample', sample_MF)):
        if len(points) <= k:
            raise ValueError(f'precision and recall need at least {k + 1} {name} images, got {len(points)}: '
                             'pass more images, or leave them out of the metrics')
    check_rows(sample_MF, reference_NF)


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
    _check_points(reference_NF, sample_MF, k)

    # The radii of each set define its manifold (Eq. 1 and 2 of the paper), which covers points of the other.
    settings = dict(mode=mode, block=block, device=device)
    radii_N = manifold_radii(reference_NF, k=k, **settings)
    radii_M = manifold_radii(sample_MF, k=k, **settings)
    covered_N, covered_M = manifold_coverage(reference_NF, radii_N, sample_MF, radii_M, **settings)
    return PrecisionRecall(
        precision=covered_M.double().mean().item(),
        recall=covered_N.double().mean().item(),
    )


def density_coverage(reference_NF: torch.Tensor, sample_MF: torch.Tensor, k: int = 5, block: int = 10_000,
                     device: torch.device | str | None = None) -> Prdc:
    """Density and coverage of samples, with precision and recall as PRDC defines them.

    Other than in `precision_recall`, a point on the edge of a ball lies outside, and distances are those of
    float64.

    Args:
        reference_NF: features of the reference images; all of them are used.
        sample_MF: features of the samples; all of them are used.
        k: which neighbour the radius of a ball reaches. For equal laws and as many points on both sides
            coverage is about 1 - 1 / 2^k: 0.875 for 3, 0.969 for 5.
        block: rows and columns of a block of distances; scores do not depend on it.
        device: where distances are computed, block by block; None computes them where the features are.
    Raises:
        ValueError: a set has k points or fewer, a feature is not finite, or the sets differ in F.
    Source: Naeem et al., arXiv 2002.09797, Eq. 2 to 4.
    """
    _check_points(reference_NF, sample_MF, k)
    settings = dict(mode='fp64', block=block, device=device)
    radii_N = manifold_radii(reference_NF, k=k, **settings)
    radii_M = manifold_radii(sample_MF, k=k, **settings)

    # One pass over all pairs: every block adds to the counts of its columns and to the marks of its rows.
    balls_M = torch.zeros_like(radii_M, dtype=torch.int64)
    holds_N = torch.zeros_like(radii_N, dtype=torch.bool)
    covered_N = torch.zeros_like(radii_N, dtype=torch.bool)
    for rows, x in _blocks(reference_NF, block, device):
        for columns, y in _blocks(sample_MF, block, device):
            balls, holds, covered = _fold_block(x, y, 'fp64', _count_within, radii_N[rows], radii_M[columns])
            balls_M[columns] += balls
            holds_N[rows] |= holds
            covered_N[rows] |= covered
    return Prdc(
        precision=(balls_M > 0).double().mean().item(),
        recall=covered_N.double().mean().item(),
        density=balls_M.double().mean().item() / k,
        coverage=holds_N.double().mean().item(),
    )
