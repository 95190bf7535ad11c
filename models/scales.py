"""Token pyramids: which positions of the flat sequence belong to which scale, how scales share a loss, and
what is measured of each.

Letters: B batch, K scales, L all tokens, l tokens of one scale, V vocabulary.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import dist

Side = int | tuple[int, int]  # of a code map: p for p x p, or (rows, columns)

MASKED_TOKENS = 256  # scales that end up to here attend in one call


def as_sizes(patch_nums: Sequence[Side]) -> tuple[tuple[int, int], ...]:
    """Sides as (rows, columns).

    Raises:
        ValueError: one is neither an integer nor a pair of integers.
    """
    try:
        pairs = [side if isinstance(side, tuple | list) else (side, side) for side in patch_nums]
        return tuple((index(height), index(width)) for height, width in pairs)
    except (TypeError, ValueError):
        raise ValueError('expected sides of code maps, each p or (rows, columns) in whole numbers, got '
                         f'{patch_nums!r}: pass such a list') from None


def check_sizes(sizes: Sequence[tuple[int, int]]) -> None:
    """Make sure that this is a pyramid.

    Raises:
        ValueError: it is empty, does not begin with 1x1, or has an empty scale.
    """
    if not sizes or sizes[0] != (1, 1) or min(map(min, sizes)) < 1:
        raise ValueError('expected sides of code maps from 1 on, such as 1, 2, 4, got '
                         f'{", ".join(map(scale_name, sizes)) or "none"}: pass such a list')


def scale_name(size: Sequence[int]) -> str:
    """'16x16': rows x columns of a code map."""
    return f'{size[0]}x{size[1]}'


def rect_schedule(patch_nums: Sequence[Side], height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Sizes of a pyramid stretched to end at height x width tokens, beginning with 1x1, none twice in a row.

    A first side that is stretched to more than 1x1 becomes 1x1, so that no step is added.

    Raises:
        ValueError: the pyramid or the size is empty.
    """
    given = as_sizes(patch_nums)
    if not given or min(height, width, *map(min, given)) < 1:
        raise ValueError(f'expected sides of code maps and a size of at least 1x1, got {tuple(patch_nums)} '
                         f'and {height}x{width}: pass both')
    last_rows, last_columns = given[-1]
    stretched = [(max(1, round(rows * height / last_rows)), max(1, round(columns * width / last_columns)))
                 for rows, columns in given]
    if len(stretched) > 1 or stretched[0] == (1, 1):
        stretched[0] = 1, 1
    else:
        stretched.insert(0, (1, 1))  # a single scale is the last one, and every pyramid begins with 1x1
    sizes = stretched[:1]
    for size in stretched[1:]:
        if size != sizes[-1]:
            sizes.append(size)
    return tuple(sizes)


@dataclass(frozen=True)
class ScaleLayout:
    """Lengths, spans and masks that follow from the sides of K token maps, coarse to fine."""

    patch_nums: tuple[Side, ...]

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) per scale."""
        return as_sizes(self.patch_nums)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per scale."""
        return tuple(height * width for height, width in self.sizes)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of each scale in the flat sequence."""
        ends = [sum(self.lengths[:k + 1]) for k in range(len(self.lengths))]
        return tuple((end - length, end) for end, length in zip(ends, self.lengths, strict=True))

    @property
    def total(self) -> int:
        """L, the tokens of all scales."""
        return sum(self.lengths)

    @property
    def num_seen_later(self) -> int:
        """Tokens that a later scale sees: all but those of the last one, 424 of 680 as published."""
        return self.total - self.lengths[-1]

    def ratio(self, k: int) -> float:
        """Position of scale k between the coarsest (0) and the finest (1); 0 for a single scale."""
        return k / max(len(self.patch_nums) - 1, 1)

    def num_scales_of(self, num_tokens: int) -> int:
        """How many leading scales hold exactly `num_tokens` tokens.

        Raises:
            ValueError: `num_tokens` does not end at a scale border.
        """
        ends = [end for _, end in self.spans]
        if num_tokens not in ends:
            raise ValueError(f'a sequence must end with a whole scale, at one of {ends} tokens, '
                             f'got {num_tokens}: '
                             f'pass the codes of whole scales of patch_nums {self.patch_nums}')
        return ends.index(num_tokens) + 1

    def level_L(self, device: torch.device | str | None = None) -> torch.Tensor:
        """(L,) int64, the scale of every token."""
        return torch.cat([torch.full((length,), k, device=device) for k, length in enumerate(self.lengths)])

    def causal_bias(self, device: torch.device | str | None = None) -> torch.Tensor:
        """(L, L) float32: 0 where the query's scale is not coarser than the key's, else -inf."""
        level = self.level_L(device)
        return torch.where(level[:, None] >= level[None, :], 0., -torch.inf)


def nearest_scales(ours: ScaleLayout, theirs: ScaleLayout) -> list[int]:
    """For every scale of `ours`, the number of the scale of `theirs` whose side is nearest, by ratio."""
    nearest = []
    for side in ours.patch_nums:
        distances = [abs(math.log(side / other)) for other in theirs.patch_nums]
        nearest.append(distances.index(min(distances)))
    return nearest


def resize_positions(table_1LC: torch.Tensor, ours: ScaleLayout, theirs: ScaleLayout) -> torch.Tensor:
    """Positions (1, L, C) of the tokens of `ours` from a table of those of `theirs`; all maps are square.

    A scale takes the positions of the nearest one, see `nearest_scales`: as they are where both sides are
    equal, else resized as an image is, since both maps cover the whole image.
    """
    scales = []
    for side, k in zip(ours.patch_nums, nearest_scales(ours, theirs), strict=True):
        begin, end = theirs.spans[k]
        position_1lC = table_1LC[:, begin:end]
        if side != theirs.patch_nums[k]:
            grid_1Cpp = position_1lC.float().transpose(1, 2).unflatten(2, theirs.sizes[k])
            # With antialiasing torch takes the cubic that keeps straight lines straight.
            grid_1Cpp = F.interpolate(grid_1Cpp, size=(side, side), mode='bicubic', antialias=True)
            position_1lC = grid_1Cpp.flatten(2).transpose(1, 2).to(table_1LC.dtype)
        scales.append(position_1lC)
    return torch.cat(scales, dim=1)


def about_resizing(ours: ScaleLayout, theirs: ScaleLayout) -> str:
    """What `resize_positions` does, in words."""
    before = '_'.join(map(str, theirs.patch_nums))
    now = '_'.join(map(str, ours.patch_nums))
    return f'positions of {len(ours.patch_nums)} scales resized from {before} to {now}'


class BlockCausal(NamedTuple):
    """What a query sees in teacher forcing: its own scale and all coarser ones.

    Every scale is a call of its own over the keys so far, which needs no mask and computes two thirds of the
    products of one masked call over all pairs of tokens. Many small calls would be slower than one, so the
    leading scales share the first call, which has a mask.
    """
    ends: tuple[int, ...]    # of the tokens of each call
    bias_11ll: torch.Tensor  # of the first call: 0 where the query sees the key, else -inf

    def to(self, dtype: torch.dtype) -> 'BlockCausal':
        """The same, with a mask of this dtype."""
        return BlockCausal(self.ends, self.bias_11ll.to(dtype))


@lru_cache(maxsize=16)  # micro-steps of a training step, and validation
def block_causal(layout: ScaleLayout, device: torch.device) -> BlockCausal:
    """What the tokens of these scales see."""
    ends = [end for _, end in layout.spans]
    first_end = max((end for end in ends if end <= MASKED_TOKENS), default=ends[0])
    leading = ScaleLayout(layout.patch_nums[:ends.index(first_end) + 1])
    # Training may use what was made in inference mode.
    with torch.inference_mode(False):
        bias_ll = leading.causal_bias(device)
    return BlockCausal(tuple(end for end in ends if end >= first_end), bias_ll[None, None])


# ---------------------------------------------------------------------------------------------- training
# How the scales share a training loss, see `scale_shares`; or a number for each scale.
Weighting = str | tuple[float, ...]


def scale_shares(layout: ScaleLayout, weighting: Weighting) -> list[float]:
    """What share of a training loss each scale has; the tokens of a scale have equal parts of it.

    Args:
        weighting: 'uniform' weighs all tokens alike, so that fine scales count most; 'equal' all scales;
            'lognorm' is a normal density of the sides in reverse order, so that middle scales count most
            (HMAR, arXiv 2506.04421); or numbers to which the shares are proportional.
    Returns:
        K numbers whose sum is 1.
    """
    num_scales = len(layout.lengths)
    if weighting == 'uniform':
        shares = list(layout.lengths)
    elif weighting == 'equal':
        shares = [1.] * num_scales
    elif weighting == 'lognorm':
        # Of an oblong map, the side is that of a square of the same area.
        side_K = np.sqrt(np.array(layout.lengths) / layout.lengths[-1])
        spread = side_K.std(ddof=1) if num_scales > 1 else 0.
        deviation_K = (side_K[::-1] - side_K.mean()) / spread if spread > 0 else np.zeros(num_scales)
        shares = np.exp(-deviation_K ** 2 / 2).tolist()
    else:
        assert len(weighting) == num_scales, f'{len(weighting)} weights of {num_scales} scales'
        shares = list(weighting)
    return [share / sum(shares) for share in shares]


def token_weights(layout: ScaleLayout, weighting: Weighting, device: torch.device) -> torch.Tensor:
    """(L,) float32: the weight of every token in a training loss, see `scale_shares`; their sum is 1."""
    if weighting == 'uniform':
        return torch.full((layout.total,), 1 / layout.total, device=device)
    shares = scale_shares(layout, weighting)
    of_scales = [torch.full((length,), share / length)
                 for length, share in zip(layout.lengths, shares, strict=True)]
    return torch.cat(of_scales).to(device)


@dataclass(frozen=True)
class ProgressiveSchedule:
    """Progressive training: coarse scales first, finer ones added one by one. All counts are micro-steps.

    Args:
        num_scales: K. total: micro-steps of the whole training.
        warmup: lr warm-up, during which the stage is the first.
        until: share of the training after which all scales take part, in (0, 1].
        first_stage: scale index of the first stage.
        stage_warmup: micro-steps over which the newest scale's loss weight grows to 1.
    """

    num_scales: int
    total: int
    warmup: float
    until: float
    first_stage: int = 4
    stage_warmup: float = 0.

    def stage(self, step: np.ndarray) -> np.ndarray:
        """Index of the finest scale trained at each step."""
        last = self.num_scales - 1
        full_from = self.total * self.until
        # Between the warm-up and `until` the stages follow each other at equal distances.
        done = np.clip((step - self.warmup) / max(full_from - self.warmup, 1e-9), 0, 1)
        stage = self.first_stage + np.round(done * (last - self.first_stage)).astype(int)
        return np.where(step <= self.warmup, self.first_stage, np.where(step >= full_from, last, stage))

    @cached_property
    def stage_begins(self) -> dict[int, int]:
        """First step of every stage that occurs."""
        stage_of_step = self.stage(np.arange(self.total))
        stages, first = np.unique(stage_of_step, return_index=True)
        return dict(zip(stages.tolist(), first.tolist(), strict=True))

    def at(self, progress: float) -> tuple[int, float]:
        """(stage, loss weight of its newest scale) after the given share of the training."""
        step = min(round(progress * self.total), self.total - 1)
        stage = int(self.stage(np.array(step)))
        is_faded_in = self.stage_begins[stage] > 0 and stage < self.num_scales - 1 and self.stage_warmup
        if not is_faded_in:
            return stage, 1.
        steps_in_stage = step - self.stage_begins[stage] + 1
        return stage, min(max(steps_in_stage / self.stage_warmup, 0.01), 1.)


def scale_metrics(loss_BL: torch.Tensor, predicted_BL: torch.Tensor, target_BL: torch.Tensor,
                  layout: ScaleLayout, stride: int, vocab_size: int | None = None) -> dict[str, torch.Tensor]:
    """Cross-entropy and top-1 accuracy in percent: mean, tail, and of every scale.

    Args:
        loss_BL: of every code, without smoothing. predicted_BL: the likeliest codes.
        layout: of the scales in the sequence; the tail is the last one.
        stride: pixels per side of a code; scales are named by their side in pixels.
        vocab_size: if it is given, add the percentage of codes that are predicted often enough, over all
            ranks.
    """
    loss_L = loss_BL.mean(0)
    acc_L = (predicted_BL == target_BL).float().mean(0).mul(100)
    metrics = dict(L_mean=loss_L.mean(), acc_mean=acc_L.mean())
    for (begin, end), (height, _) in zip(layout.spans, layout.sizes, strict=True):
        side = height * stride
        metrics[f'L_{side}'] = loss_L[begin:end].mean()
        metrics[f'acc_{side}'] = acc_L[begin:end].mean()
    metrics['L_tail'] = metrics[f'L_{side}']
    metrics['acc_tail'] = metrics[f'acc_{side}']
    if vocab_size:
        # A code counts as used from a thousandth of an even share of the predictions on.
        hit_V = torch.bincount(predicted_BL.flatten(), minlength=vocab_size).float()
        dist.allreduce(hit_V)
        metrics['z_voc_usage'] = (hit_V / hit_V.sum() > 0.001 / vocab_size).float().mean() * 100
    return metrics
