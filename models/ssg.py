"""SSG: logits of a scale, moved away from what the scale before it already says (arXiv 2602.05534).

Before codes are drawn, logits_k becomes logits_k + b_k (logits_k - prior_k), where prior_k is the map of
logits of the previous scale, enlarged to the size of scale k. What is new in the scale counts more, what it
repeats counts less. It needs no training and no further pass.

No code of the paper is public. How the spectrum of the prior is filled, what b_k is at each scale, and that
guidance comes first are our reading.
Letters: B batch, l tokens of one scale, V vocabulary.
"""
import math
from functools import lru_cache

import torch
from torch.nn import functional as F

from models.precision import float32_matmul
from models.scales import ScaleLayout

Size = tuple[int, int]  # rows and columns of a code map

PRIORS = ('fused', 'zero_pad', 'bilinear')
SCHEDULES = ('constant', 'linear')


# ---------------------------------------------------------------------------------------------- the prior
def cosines(count: int) -> torch.Tensor:
    """(count, count) float64: the orthonormal discrete cosine transform, a frequency per row."""
    frequency = torch.arange(count, dtype=torch.float64, device='cpu')
    place = frequency + 0.5
    waves = (frequency[:, None] * place * (math.pi / count)).cos() * math.sqrt(2 / count)
    waves[0] = math.sqrt(1 / count)
    return waves


def enlarged_spectrum(old: int, new: int) -> torch.Tensor:
    """(new, old) float64: a line of `old` values as one of `new` values with the same low frequencies.

    The frequencies that it lacks are zero; where it becomes shorter, the highest ones are cut.
    """
    num_shared = min(old, new)
    return cosines(new)[:num_shared].T @ cosines(old)[:num_shared] * math.sqrt(new / old)


def interpolation(old: int, new: int) -> torch.Tensor:
    """(new, old) float64: linear interpolation of a line of `old` values, with half-pixel centres."""
    unit_lines = torch.eye(old, dtype=torch.float64, device='cpu')
    return F.interpolate(unit_lines[None], size=new, mode='linear')[0].T


def low_frequencies(old: int, new: int) -> torch.Tensor:
    """(new, new) float64: the part of a line of `new` values that one of `old` values could have, too."""
    waves = cosines(new)[:min(old, new)]
    return waves.T @ waves


@lru_cache(maxsize=128)  # of a few pyramids; of 32x32 from 24x24, the largest published one, it has 5 MB
def enlargement(size: Size, next_size: Size, prior: str) -> torch.Tensor:
    """(next l, l) float64: the product that enlarges a flat map, see `PRIORS`.

    Args:
        prior: 'zero_pad' keeps the spectrum of the map, and all higher frequencies are zero; 'bilinear'
            interpolates; 'fused' has the low frequencies of the first and the high ones of the second.
    """
    axes = list(zip(size, next_size, strict=True))
    padded = torch.kron(*(enlarged_spectrum(old, new) for old, new in axes))
    if prior == 'zero_pad':
        return padded
    interpolated = torch.kron(*(interpolation(old, new) for old, new in axes))
    if prior == 'bilinear':
        return interpolated
    low = torch.kron(*(low_frequencies(old, new) @ interpolation(old, new) for old, new in axes))
    return interpolated - low + padded


# ---------------------------------------------------------------------------------------------- sampling
class SSG:
    """What one sampling run does to the logits of its scales, from the coarsest to the finest.

    Args:
        layout: of the scales.
        strength: b of all scales but the first, which has no prior; 0 is off.
        prior: see `enlargement`.
        schedule: 'constant', or 'linear', by which b grows from 0 at the first scale to `strength` at the
            last one.
    Raises:
        ValueError: the prior or the schedule is unknown.
    """

    def __init__(self, layout: ScaleLayout, strength: float, prior: str = 'fused',
                 schedule: str = 'constant'):
        for name, value, known in (('ssg_prior', prior, PRIORS), ('ssg_schedule', schedule, SCHEDULES)):
            if value not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}')
        self.layout = layout
        self.strength = strength
        self.prior = prior
        self.schedule = schedule
        self.previous_BlV: torch.Tensor | None = None  # logits of the scale before, as they came

    def __call__(self, k: int, logits_BlV: torch.Tensor) -> torch.Tensor:
        """The logits of scale k that codes are drawn from; scales come in their order.

        Args:
            logits_BlV: guided, and not filtered, since differences of infinite logits say nothing.
        """
        if self.strength == 0:
            return logits_BlV
        previous_BlV = self.previous_BlV
        self.previous_BlV = logits_BlV
        if k == 0:
            return logits_BlV

        # In full float32 under any autocast: logits are large, and their differences small.
        sizes = self.layout.sizes
        with torch.autocast(logits_BlV.device.type, enabled=False), float32_matmul():
            enlarge_ll = enlargement(sizes[k - 1], sizes[k], self.prior).to(logits_BlV)
            prior_BlV = enlarge_ll @ previous_BlV
            factor = self.strength if self.schedule == 'constant' else self.strength * self.layout.ratio(k)
            return logits_BlV + factor * (logits_BlV - prior_BlV)
