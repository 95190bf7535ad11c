"""Layout of a token pyramid: which positions of the flat sequence belong to which scale.

Letters: K scales, L all tokens, l tokens of one scale.
"""
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class ScaleLayout:
    """Lengths, spans and masks that follow from the side lengths of K square token maps, coarse to fine."""

    patch_nums: tuple[int, ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per scale."""
        return tuple(pn * pn for pn in self.patch_nums)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of each scale in the flat sequence."""
        ends = [sum(self.lengths[:k + 1]) for k in range(len(self.lengths))]
        return tuple((end - length, end) for end, length in zip(ends, self.lengths, strict=True))

    @property
    def total(self) -> int:
        """L, the tokens of all scales."""
        return sum(self.lengths)

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

    def level_L(self) -> torch.Tensor:
        """(L,) int64, the scale of every token."""
        return torch.cat([torch.full((length,), k) for k, length in enumerate(self.lengths)])

    def causal_bias(self) -> torch.Tensor:
        """(L, L) float32: 0 where the query's scale is not coarser than the key's, else -inf."""
        level = self.level_L()
        return torch.where(level[:, None] >= level[None, :], 0., -torch.inf)
