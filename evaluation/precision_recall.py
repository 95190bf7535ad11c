"""Precision and recall of sets of features, as the original evaluation of ADM (guided-diffusion) has them.

Letters: N and M rows, n rows of a slice, F features.
"""
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from utils.misc import full_precision


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""
    precision: float  # of samples that lie on the manifold of the reference
    recall: float     # of reference images that lie on the manifold of the samples


Slices = Iterator[tuple[slice, torch.Tensor]]  # of the rows of a block: which ones, their distances
SLICE = 2 ** 21                                # distances of a slice: 8 MB of float32


def _half_distances(x_NF: torch.Tensor, y_MF: torch.Tensor) -> Slices:
    """Squared distances by the original's arithmetic in float16, then as float32.

    Inputs, squares, norms, products and their sums are rounded to float16; sums over F are in float32.

    Raises:
        OverflowError: one is not finite.
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
        # Upstream parity: where 2 x.y alone overflows, -inf becomes 0 here and nothing is redone in float32
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
        yield rows, (norms_n1 - 2 * (x_nF @ y_MF.T) + norms_M).clamp_min_(0)


def _slices(x_NF: torch.Tensor, y_MF: torch.Tensor) -> list[slice]:
    step = max(SLICE // len(y_MF), 1)
    return [slice(begin, begin + step) for begin in range(0, len(x_NF), step)]


def _fold_block(x_NF: torch.Tensor, y_MF: torch.Tensor, mode: str, fold: Callable[..., Any],
                *args: torch.Tensor) -> Any:
    """`fold(slices of distances, *args)` of a block.

    As in the original, a block that overflows in float16 is redone as a whole in float32: `fold` is called a
    second time, and must not have changed its arguments.
    """
    with full_precision():
        if mode == 'adm':
            with suppress(OverflowError):
                return fold(_half_distances(x_NF, y_MF), *args)
        return fold(_float_distances(x_NF, y_MF), *args)


def _merge_nearest(slices: Slices, nearest: torch.Tensor) -> torch.Tensor:
    """The smallest distances of every row so far, (N, k + 1) ascending, with those of a block."""
    count = nearest.shape[1]
    merged = torch.empty_like(nearest)
    for rows, distance_nM in slices:
        nearest_here = distance_nM.topk(min(count, distance_nM.shape[1]), largest=False).values
        merged[rows] = torch.cat([nearest[rows], nearest_here], 1).topk(count, largest=False).values
    return merged


def _find_covered(slices: Slices, radii_N: torch.Tensor,
                  radii_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows lie within the radius of a column, (N,) bool, and columns within that of a row, (M,)."""
    covered_N, covered_M = (torch.zeros_like(radii, dtype=torch.bool) for radii in (radii_N, radii_M))
    for rows, distance_nM in slices:
        covered_N[rows] = (distance_nM <= radii_M).any(1)
        covered_M |= (distance_nM <= radii_N[rows, None]).any(0)
    return covered_N, covered_M


def _blocks(points_NF: torch.Tensor, block: int,
            device: torch.device | str | None) -> Iterator[tuple[slice, torch.Tensor]]:
    for begin in range(0, len(points_NF), block):
        yield (rows := slice(begin, begin + block)), points_NF[rows].to(device=device, dtype=torch.float32)


def manifold_radii(points_NF: torch.Tensor, mode: str = 'adm', k: int = 3, block: int = 10_000,
                   device: torch.device | str | None = None) -> torch.Tensor:
    """(N,) float32 squared distance of every point to its k-th neighbour; see `precision_recall`."""
    radii = []
    for _, x in _blocks(points_NF, block, device):
        nearest = x.new_full((len(x), k + 1), torch.inf)  # the point itself is the first of them
        for _, y in _blocks(points_NF, block, device):
            nearest = _fold_block(x, y, mode, _merge_nearest, nearest)
        radii.append(nearest[:, k])
    return torch.cat(radii)


def manifold_coverage(reference_NF: torch.Tensor, radii_N: torch.Tensor, sample_MF: torch.Tensor,
                      radii_M: torch.Tensor, mode: str = 'adm', block: int = 10_000,
                      device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which reference points lie on the manifold of the samples, (N,) bool, and the other way round, (M,).

    A point lies on a manifold if its distance to any of its points is at most the radius of that.
    """
    covered_N, covered_M = (torch.zeros_like(radii, dtype=torch.bool) for radii in (radii_N, radii_M))
    for rows, x in _blocks(reference_NF, block, device):
        for columns, y in _blocks(sample_MF, block, device):
            of_rows, of_columns = _fold_block(x, y, mode, _find_covered, radii_N[rows], radii_M[columns])
            covered_N[rows] |= of_rows
            covered_M[columns] |= of_columns
    return covered_N, covered_M


def precision_recall(reference_NF: torch.Tensor, sample_MF: torch.Tensor, mode: str = 'adm', k: int = 3,
                     block: int = 10_000, device: torch.device | str | None = None) -> PrecisionRecall:
    """Precision and recall of samples, with balls to the k-th neighbour around points as manifolds.

    Args:
        reference_NF, sample_MF: float32 features; all points are used.
        mode: 'adm' repeats the original, whose distances are float16 and whose scores are therefore slightly
            higher; 'fp32' is in float32.
        block: rows and columns of a block of distances; matters to scores only where float16 overflows.
        device: where distances are computed, block by block; None: where the features are.
    Raises:
        ValueError: a set has at most k points, a feature is not finite, or the two differ in F.
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
        if not torch.stack(points.aminmax()).isfinite().all():  # makes no copy of all points
            raise ValueError(f'expected finite features, {name} image '
                             f'{points.isfinite().all(1).int().argmin().item()} has nan or infinite ones: '
                             'check its pixels and the weights')
    settings = dict(mode=mode, block=block, device=device)
    radii_N, radii_M = (manifold_radii(points, k=k, **settings) for points in (reference_NF, sample_MF))
    covered_N, covered_M = manifold_coverage(reference_NF, radii_N, sample_MF, radii_M, **settings)
    return PrecisionRecall(covered_M.double().mean().item(), covered_N.double().mean().item())
