"""Contracts of this package: what a trainer needs of a model, what a generator needs of its tokenizer.

Letters: B batch, 3HW image.
"""
import time
from collections import deque
from typing import Any

import torch
from torch import nn


class Stopwatch:
    """Seconds spent inside `with stopwatch:`; on CUDA between events, so timing never waits for the GPU."""

    def __init__(self):
        self.pending: deque[list] = deque(maxlen=10_000)  # the older ones are forgotten if nobody asks

    def __enter__(self):
        self.pending.append([self._now()])

    def __exit__(self, *_):
        self.pending[-1].append(self._now())

    @staticmethod
    def _now() -> float | torch.cuda.Event:
        if not torch.cuda.is_initialized():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Seconds since the last call."""
        seconds = 0.
        for begin, end in self.pending:
            if isinstance(begin, float):
                seconds += end - begin
            else:
                end.synchronize()
                seconds += begin.elapsed_time(end) / 1000
        self.pending.clear()
        return seconds


class Trainable(nn.Module):
    """What `Trainer` and `train.py` know of a model, generator or tokenizer alike."""

    headline: dict[str, str] = {}  # name in the progress line -> key of `metrics`
    selection: str = ''            # key of `metrics` whose lowest validation value marks the best checkpoint

    def training_loss(self, images_B3HW: torch.Tensor, label_B: torch.Tensor,
                      progress: float = 1.) -> tuple[torch.Tensor, dict[str, Any]]:
        """The scalar to minimise, and whatever `metrics` needs.

        Args:
            images_B3HW: pixels in [-1, 1].
            label_B: class ids, int64.
            progress: fraction of the optimizer steps already done, in [0, 1]; curricula follow it.
        """
        raise NotImplementedError

    def metrics(self, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Scalars to log, means over the batch; called on logging steps and for every validation batch."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called on every rank after each optimizer step, for parameters no optimizer moves."""

    def config_state(self, progress: float) -> dict[str, Any]:
        """What `trainer.config` of a checkpoint records beside the weights."""
        return {}

    def training_state(self) -> dict[str, Any]:
        """State of training that is no part of the exported weights; restored by `load_training_state`."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Inverse of `training_state`."""

    def no_weight_decay(self) -> set[str]:
        """Parameters whose name holds any of these strings get no weight decay."""
        return set()

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Constructor arguments that the keys and shapes of a published or trained state dict reveal."""
        raise NotImplementedError


def load_weights(model: Trainable, state: dict[str, torch.Tensor], source: str) -> None:
    """Strict load whose error says in one line which constructor argument differs.

    Raises:
        ValueError: the weights belong to another architecture or are incomplete.
    """
    try:
        theirs = model.kwargs_from_state_dict(state)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f'{source} holds no {type(model).__name__} weights '
                         f'({error!r} while reading its keys): pass a checkpoint of that model') from None
    ours = model.kwargs_from_state_dict(model.state_dict())
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        listing = ', '.join(f'{name}={theirs[name]} (here {ours[name]})' for name in differing)
        raise ValueError(f'{source} is a {type(model).__name__} with {listing}: '
                         'change the flags to match it, or start in another output folder')
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f'{source} does not fit {type(model).__name__}: '
                         f'{" ".join(str(error).split())[:400]}') from None


class Tokenizer(Trainable):
    """An image coder. Codes are whatever its generator predicts; see each subclass.

    Attributes:
        stride: pixels per side of the finest code.
        channels: width Z of a code's embedding.
        vocab_size: number of codes, None for continuous ones.
        clock: time spent in `encode`.
    """

    stride: int
    channels: int
    vocab_size: int | None

    def __init__(self):
        super().__init__()
        self.clock = Stopwatch()

    @torch.no_grad()
    def encode(self, images_B3HW: torch.Tensor, *args) -> Any:
        """Codes of images in [-1, 1], in float32 whatever autocast says, since training losses call it."""
        with self.clock, torch.autocast(images_B3HW.device.type, enabled=False):
            return self._encode(images_B3HW.float(), *args)

    def _encode(self, images_B3HW: torch.Tensor, *args) -> Any:
        raise NotImplementedError

    def decode(self, tokens: Any) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] of what `encode` returns."""
        raise NotImplementedError


class ARModel(Trainable):
    """A class-conditional generator over the codes of a frozen tokenizer.

    The tokenizer is kept as a plain reference: it is no part of parameters(), state_dict() or .to().
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        object.__setattr__(self, 'tokenizer', tokenizer)

    @staticmethod
    def tokenizer_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments of the tokenizer that follow from those of this model."""
        return {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def init_weights(self, *args, **kwargs) -> None:
        """Every initialisation rule of the paper, in one place."""
        raise NotImplementedError

    def sample(self, labels: Any, *, guidance: float, rng: Any, **options) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1]; `guidance` is s of `guide`, 1 is off."""
        raise NotImplementedError
