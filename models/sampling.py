"""What sampling is like in every family: eval mode, a key/value cache, and everything back as it was.

Letters: B batch, 3HW image.
"""
from collections.abc import Iterable, Iterator
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
