"""Distances of two sets of features by a kernel, the maximum mean discrepancy: KID and CMMD.

MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y). Its unbiased form leaves out the pairs of a row with
itself, and may be negative. The N x M values of a kernel never lie in memory together: `kernel_sum` adds them
up block by block in float64. Letters: N and M rows, n and m rows of a block, F features.
"""
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

BLOCK = 2000               # rows and columns of a block of kernel values: 32 MB of float64
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
KID_SEED = 2020            # of the subsets, as in torch-fidelity
NUM_ERROR_BLOCKS = 10      # disjoint parts of the sample whose scores tell the error of the whole
CMMD_BANDWIDTH = 10.       # sigma of the Gaussian kernel
CMMD_SCALE = 1000.         # CMMD is a thousand times MMD^2

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # rows (n, F), (m, F) float64 -> values (n, m)


class Pairwise(NamedTuple):
    """A mean over pairs of rows in both forms, or a discrepancy that is made of such means."""
    biased: float    # with the pairs of a row with itself
    unbiased: float  # without them


class Estimate(NamedTuple):
    """A score and how far it may be off."""
    value: float
    error: float  # its standard error; nan where there are too few rows for one


class Subsets(NamedTuple):
    """KID as it is published: over random subsets."""
    mean: float
    std: float            # population standard deviation over the subsets
    values_K: np.ndarray  # float64, of every subset


# ---------------------------------------------------------------------------------------------- kernels
def cubic_kernel(x_nF: torch.Tensor, y_mF: torch.Tensor) -> torch.Tensor:
    """(x.y / F + 1)^3, the kernel of KID."""
    return (x_nF @ y_mF.T / x_nF.shape[1] + 1) ** 3


def gaussian_kernel_minus_one(x_nF: torch.Tensor, y_mF: torch.Tensor) -> torch.Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)) - 1, the kernel of CMMD but for a constant.

    Rows of unit length are at most 2 apart, so that all values of the kernel lie within 0.02 of 1. The ones
    cancel in MMD^2; with them, most of the digits of the sums would be lost.
    """
    norms_n1 = x_nF.square().sum(1, keepdim=True)
    norms_m = y_mF.square().sum(1)
    distance_nm = norms_n1 - 2 * (x_nF @ y_mF.T) + norms_m
    return torch.expm1(-distance_nm.clamp_min(0) / (2 * CMMD_BANDWIDTH ** 2))


# ---------------------------------------------------------------------------------------------- sums
def _blocks(rows_NF: torch.Tensor, block: int, device: torch.device | str | None) -> Iterator[torch.Tensor]:
    """The rows in blocks, float64 on the device."""
    for part_nF in rows_NF.split(block):
        yield part_nF.to(device=device, dtype=torch.float64)


def kernel_sum(x_NF: torch.Tensor, y_MF: torch.Tensor, kernel: Kernel, block: int = BLOCK,
               device: torch.device | str | None = None) -> float:
    """Sum of k(x, y) over all pairs of rows, in float64.

    Args:
        block: rows and columns whose values are in memory at a time; the sum does not depend on it but for
            rounding.
        device: where values are computed; None computes them where the rows are.
    """
    total = 0.
    for x_nF in _blocks(x_NF, block, device):
        for y_mF in _blocks(y_MF, block, device):
            total += kernel(x_nF, y_mF).sum().item()
    return total


def _means_with_itself(x_NF: torch.Tensor, kernel: Kernel, block: int,
                       device: torch.device | str | None) -> Pairwise:
    """Mean of k(x, x') over all pairs of rows of one set, and over those of two different rows."""
    total = 0.
    of_diagonal = 0.
    for number, x_nF in enumerate(_blocks(x_NF, block, device)):
        values_nn = kernel(x_nF, x_nF)
        total += values_nn.sum().item()
        of_diagonal += values_nn.diagonal().sum().item()

        # The kernel is symmetric: a block above the diagonal stands for the one below it, too.
        after_MF = x_NF[(number + 1) * block:]
        for y_mF in _blocks(after_MF, block, device):
            total += 2 * kernel(x_nF, y_mF).sum().item()
    count = len(x_NF)
    return Pairwise(total / count ** 2, (total - of_diagonal) / (count * (count - 1)))


def squared_mmd(x_NF: torch.Tensor, y_MF: torch.Tensor, kernel: Kernel, block: int = BLOCK,
                device: torch.device | str | None = None) -> Pairwise:
    """MMD^2 of two sets of rows in float64; see the top of this file.

    Args:
        block: see `kernel_sum`.
        device: see `kernel_sum`.
    Raises:
        ValueError: a set has fewer than two rows, a feature is not finite, or the sets differ in F.
    Source: Gretton et al., JMLR 2012, Eq. 3 (unbiased) and 5 (biased).
    """
    check_rows(x_NF, y_MF)
    xx = _means_with_itself(x_NF, kernel, block, device)
    yy = _means_with_itself(y_MF, kernel, block, device)
    xy = kernel_sum(x_NF, y_MF, kernel, block, device) / (len(x_NF) * len(y_MF))
    return Pairwise(xx.biased + yy.biased - 2 * xy, xx.unbiased + yy.unbiased - 2 * xy)


def check_rows(sample_NF: torch.Tensor, reference_MF: torch.Tensor, least: int = 2) -> None:
    """Make sure that two sets of features can be compared row by row.

    Args:
        least: number of rows that each set must have.
    Raises:
        ValueError: a set has fewer rows, a feature is not finite, or the sets differ in F.
    """
    if sample_NF.shape[1] != reference_MF.shape[1]:
        raise ValueError(f'expected features of one network, got {reference_MF.shape[1]} of the reference, '
                         f'{sample_NF.shape[1]} of the samples: compute both anew')
    for name, rows in (('sample', sample_NF), ('reference', reference_MF)):
        if len(rows) < least:
            raise ValueError(f'expected at least {least} images in the {name}, got {len(rows)}: pass more '
                             'images, or leave this metric out')
        # The extremes are finite only where all features are, and need no copy of all rows.
        if not torch.stack(rows.aminmax()).isfinite().all():
            raise ValueError(f'expected finite features, {name} image '
                             f'{rows.isfinite().all(1).int().argmin().item()} has nan or infinite ones: '
                             'check its pixels and the weights')


# ---------------------------------------------------------------------------------------------- KID
def kid(sample_NF: torch.Tensor, reference_MF: torch.Tensor, device: torch.device | str | None = None,
        block: int = BLOCK) -> Estimate:
    """Kernel Inception Distance of all rows, unbiased; a set that is as good as the reference has 0 on
    average.

    Args:
        device: see `kernel_sum`.
        block: see `kernel_sum`.
    Returns:
        The distance, and its standard error by `NUM_ERROR_BLOCKS` disjoint parts of the sample, each against
        the whole reference. Where the sample has the law of the reference, the error is smaller than that.
    Raises:
        ValueError: see `squared_mmd`.
    Source: Binkowski et al., arXiv 1801.01401.
    """
    value = squared_mmd(sample_NF, reference_MF, cubic_kernel, block, device).unbiased
    return Estimate(value, _standard_error(sample_NF, reference_MF, cubic_kernel, block, device))


def _standard_error(sample_NF: torch.Tensor, reference_MF: torch.Tensor, kernel: Kernel, block: int,
                    device: torch.device | str | None) -> float:
    """Standard error of the unbiased MMD^2, by disjoint parts of the sample; nan where they would be too
    small.

    The reference is the same for all of them, and its own term cancels in their differences.
    """
    part_size = len(sample_NF) // NUM_ERROR_BLOCKS
    if part_size < 2:
        return float('nan')
    values = []
    for part_nF in sample_NF.split(part_size)[:NUM_ERROR_BLOCKS]:
        xx = _means_with_itself(part_nF, kernel, block, device).unbiased
        xy = kernel_sum(part_nF, reference_MF, kernel, block, device) / (part_size * len(reference_MF))
        values.append(xx - 2 * xy)
    return float(np.std(values, ddof=1) / NUM_ERROR_BLOCKS ** 0.5)


def kid_of_subsets(sample_NF: torch.Tensor, reference_MF: torch.Tensor, num_subsets: int = KID_SUBSETS,
                   subset_size: int = KID_SUBSET_SIZE, seed: int = KID_SEED,
                   device: torch.device | str | None = None) -> Subsets:
    """Kernel Inception Distance as torch-fidelity computes it: the mean over random subsets.

    Each subset is drawn without replacement, first from the sample, then from the reference, by numpy's
    RandomState. torch-fidelity calls the sample its first input.

    Raises:
        ValueError: a set has fewer rows than a subset, a feature is not finite, or the sets differ in F.
    """
    check_rows(sample_NF, reference_MF, least=subset_size)
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        sample_rows = rng.choice(len(sample_NF), subset_size, replace=False)
        reference_rows = rng.choice(len(reference_MF), subset_size, replace=False)
        value = squared_mmd(
            sample_NF[torch.from_numpy(sample_rows)],
            reference_MF[torch.from_numpy(reference_rows)],
            cubic_kernel,
            device=device,
        )
        values.append(value.unbiased)
    return Subsets(float(np.mean(values)), float(np.std(values)), np.array(values))


# ---------------------------------------------------------------------------------------------- CMMD
def cmmd(sample_NF: torch.Tensor, reference_MF: torch.Tensor, device: torch.device | str | None = None,
         block: int = BLOCK) -> Pairwise:
    """CMMD of embeddings of unit length: 1000 MMD^2 with a Gaussian kernel.

    Args:
        device: see `kernel_sum`.
        block: see `kernel_sum`.
    Returns:
        Both forms. The abstract of the paper speaks of the unbiased one, its code and its numbers are of the
        biased one.
    Raises:
        ValueError: see `squared_mmd`.
    Source: Jayasumana et al., arXiv 2401.09603, Sec. 4.
    """
    mmd = squared_mmd(sample_NF, reference_MF, gaussian_kernel_minus_one, block, device)
    return Pairwise(CMMD_SCALE * mmd.biased, CMMD_SCALE * mmd.unbiased)


def cmmd_error(sample_NF: torch.Tensor, reference_MF: torch.Tensor, device: torch.device | str | None = None,
               block: int = BLOCK) -> float:
    """Standard error of the unbiased `cmmd`, by the same parts of the sample as of `kid`."""
    error = _standard_error(sample_NF, reference_MF, gaussian_kernel_minus_one, block, device)
    return CMMD_SCALE * error
