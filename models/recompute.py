"""Activations that are computed again in the backward pass, in place of being kept for it, to save memory."""
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A block of a stack, all or a part of which can be computed again in the backward pass.

    Attributes:
        recompute: 'none'; 'attention' for queries, keys, values and what each head sees; 'block' for all.
    """

    recompute = 'none'

    def recomputed(self, part: str, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; its activations are not kept where `recompute` is this part.

        Random numbers are the same both times: torch's generators go back to where they were, and
        `GlobalBatch.current` still is that of the micro-step.

        Args:
            part: 'attention' or 'block'.
        """
        if self.recompute != part or not self.training or not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False)


def set_recompute(module: nn.Module, what: str) -> None:
    """Choose what all blocks inside a module compute again, see `Recomputable`."""
    for block in module.modules():
        if isinstance(block, Recomputable):
            block.recompute = what


def recomputes(module: nn.Module) -> bool:
    """Whether any block inside a module computes anything again."""
    blocks = [block for block in module.modules() if isinstance(block, Recomputable)]
    return any(block.recompute != 'none' for block in blocks)
