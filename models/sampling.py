"""What sampling is like in every family: eval mode, a key/value cache, and everything back as it was.

Letters: B batch, 3HW image.
"""
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from models.attention import kv_caching


@contextmanager
def sampling_mode(model: nn.Module, blocks: Iterable[nn.Module], capacity: int) -> Iterator[None]:
    """Inside, the model is in eval mode and its blocks keep keys and values: it serves nothing else.

    Mode and caches are put back after an error, too, and where a generator that stands inside is closed.

    Args:
        capacity: tokens whose keys and values are stored, see `KVCache`.
    """
    was_training = model.training
    model.eval()
    try:
        with kv_caching(blocks, capacity):
            yield
    finally:
        model.train(was_training)


def limit_guidance(scale_k: Sequence[float], first: int, last: int) -> tuple[list[float], int]:
    """Guidance that acts at some scales alone, and how long sampling needs the null class for it.

    A guided scale sees the keys of all coarser scales, those of the null class, too. So the null class takes
    part in every scale up to the last guided one, and in no scale after it.

    Args:
        scale_k: s of `guide` at every scale; 1 is off.
        first: scales before this one are not guided; the coarsest scale is 0.
        last: scales after this one are not guided; -1 is the finest scale.
    Returns:
        s of every scale; and the number of leading scales that need the null class.
    Raises:
        ValueError: `first` or `last` is no scale, or no scale lies between them.
    """
    num_scales = len(scale_k)
    end = num_scales if last < 0 else last + 1
    if not 0 <= first < end <= num_scales:
        raise ValueError(f'guidance must begin and end at scales in 0..{num_scales - 1}, got '
                         f'cfg_from={first} and cfg_to={last}: pass two scales in this order, or cfg_to=-1 '
                         'for the finest one')
    limited_k = [scale if first <= k < end else 1. for k, scale in enumerate(scale_k)]
    guided = [k for k, scale in enumerate(limited_k) if scale != 1]
    return limited_k, max(guided, default=-1) + 1


def forget_null_class(
    blocks: Iterable[nn.Module],
    modulations: Sequence[torch.Tensor],
    head_modulation: torch.Tensor,
    num_images: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Take the second half of the batch, which has the null class, out of all that outlives a scale.

    Args:
        blocks: their caches keep the keys and values of the images alone.
        modulations, head_modulation: what the class does to each block and to the head, of both halves.
        num_images: length of the first half.
    Returns:
        Both modulations of the first half.
    """
    for block in blocks:
        block.attn.cache.truncate(num_images)
    return [of_block[:num_images] for of_block in modulations], head_modulation[:num_images]


def mark_damaged(images_B3HW: torch.Tensor, finite_B: torch.Tensor) -> torch.Tensor:
    """The images, in place, with nan for every pixel of those whose logits were not finite.

    Codes are drawn from such logits, too, and would make an image that looks like any other.
    """
    return images_B3HW.masked_fill_(~finite_B[:, None, None, None], torch.nan)


def with_finite(steps: Iterable[Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    """(step, (B,) whether all logits of each image were finite so far), for `mark_damaged`."""
    finite_B = None
    for step in steps:
        is_finite_B = step.logits_BlV.isfinite().flatten(1).all(1)
        finite_B = is_finite_B if finite_B is None else finite_B & is_finite_B
        yield step, finite_B
