"""Contracts of this package: what a trainer needs of a model, what a generator needs of its tokenizer.

Letters: B batch, 3HW image.
"""
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from models.loading import load_weights


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


def num_weights(*modules: nn.Module) -> int:
    """Entries of the matrices of all linear layers inside: N of the 2 N FLOPs per token of a forward pass."""
    linear = [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(part.weight.numel() for part in linear)


def at_least_float32(t: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32, float32 and float64 stay."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Trainable(nn.Module):
    """What the trainers and `train.py` know of a model, generator or tokenizer alike."""

    headline: dict[str, str] = {}  # name in the progress line -> key of the metrics
    legend: str = ''               # what these names mean, for people who read the line
    selection: str = ''            # key of the metrics whose lowest value marks the best checkpoint
    rank_local: frozenset[str] = frozenset()  # keys of the state dict that differ between ranks by design

    def warm_start(self, state: dict[str, torch.Tensor], source: str) -> None:
        """Begin training from the weights of an earlier one; see `load_weights`."""
        load_weights(self, state, source)

    def after_step(self, progress: float) -> dict[nn.Parameter, torch.Tensor]:
        """Called on every rank after each optimizer step, for what no optimizer moves.

        Returns:
            rows that were overwritten, by parameter: the optimizer forgets what it knew of them.
        """
        return {}

    def forget_step(self) -> None:
        """Called in place of `after_step` where a step was not finite: discard what the model noted in it."""

    def compiled_parts(self) -> list[nn.Module]:
        """Modules that `torch.compile` is applied to."""
        return [self]

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
    def kwargs_from_size(**size: Any) -> dict[str, Any]:
        """Constructor arguments that follow from what names the size of a model, such as its depth."""
        return {}

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Constructor arguments that the keys and shapes of a published or trained state dict reveal."""
        raise NotImplementedError


class Reconstruction(NamedTuple):
    """What a tokenizer hands to its training losses.

    Attributes:
        views: (target, reconstruction) pairs of float32 images (B, 3, h, w), not clamped, the last one at
            full size; a single pair unless the tokenizer decodes several sizes.
        latent_loss: scalar, the quantizer's loss or the weighted KL divergence.
        parts: detached scalars worth logging.
        codes: codes (B, l) int64 by the name of their scale, such as '16x16'; empty for continuous codes.
    """
    views: list[tuple[torch.Tensor, torch.Tensor]]
    latent_loss: torch.Tensor
    parts: dict[str, torch.Tensor]
    codes: dict[str, torch.Tensor]


class Tokenizer(Trainable):
    """An image coder. Codes are whatever its generator predicts; see each subclass.

    Attributes:
        stride: pixels per side of the finest code.
        channels: width Z of a code's embedding.
        vocab_size: number of codes, None for continuous ones.
        clock: time spent in `encode`.
        needs_calibration: whether `calibrate` does anything.
        has_idle_parameters: whether early steps leave trained parameters without a gradient.
        not_averaged: parameters that are left out of the average of the weights, which copies them: restarts
            make rows of a codebook jump, and an average over a jump means nothing.
        built_settings: keys of `config_state` that decide the codes but leave no trace in the weights; fixed
            when the tokenizer is built.
        measured_settings: the same, but measured in training, by `calibrate`.
    """

    stride: int
    channels: int
    vocab_size: int | None
    selection = 'rec_score'
    needs_calibration = False
    has_idle_parameters = False
    not_averaged = frozenset({'quantize.embedding.weight'})
    built_settings: tuple[str, ...] = ()
    measured_settings: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.clock = Stopwatch()

    @torch.no_grad()
    def encode(self, images_B3HW: torch.Tensor, *args) -> Any:
        """Codes of images in [-1, 1], in float32 whatever autocast says, since training losses call it.

        Stored codes, which `precompute` made of images, are taken in the place of images: they are int64.

        Raises:
            ValueError: a side is no multiple of the stride.
        """
        if images_B3HW.dtype == torch.int64:
            return self._unpack(images_B3HW, *args)
        self.check_size(images_B3HW)
        with self.clock, torch.autocast(images_B3HW.device.type, enabled=False):
            return self._encode(at_least_float32(images_B3HW), *args)

    def _encode(self, images_B3HW: torch.Tensor, *args) -> Any:
        raise NotImplementedError

    def _unpack(self, idx_BL: torch.Tensor, *args) -> Any:
        """What `encode` returns for the images that these codes were stored of."""
        return idx_BL

    @torch.no_grad()
    def precompute(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """What `extract.py` stores of images; `encode` takes it in their place."""
        return self.encode(images_B3HW)

    def settings_of_codes(self) -> dict[str, Any]:
        """The settings that decide the codes but leave no trace in the weights, see `built_settings`."""
        config = self.config_state(1.)
        return {name: config[name] for name in self.built_settings}

    def shape_of_stored(self, image_size: int) -> tuple[int, ...]:
        """Of what `precompute` gives for a square image of that many pixels per side."""
        parameter = next(self.parameters())
        return tuple(self.precompute(parameter.new_zeros(1, 3, image_size, image_size)).shape[1:])

    def decode(self, tokens: Any) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] of what `encode` returns."""
        raise NotImplementedError

    def reconstruct(self, images_B3HW: torch.Tensor, progress: float = 1.) -> Reconstruction:
        """Encode and decode with gradients, for the training losses; random parts only in training mode.

        Args:
            progress: share of the training done, in [0, 1].
        """
        raise NotImplementedError

    def progressive(self, images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reconstructions in [-1, 1] by the name of the last scale they use, coarse to fine, for pictures."""
        raise NotImplementedError

    def code_metrics(self) -> dict[str, float]:
        """How the codes are used in training, equal on all ranks: usage, perplexity, restarts, alarms."""
        return {}

    def code_counts(self) -> dict[str, torch.Tensor]:
        """How often each code (V,) was used lately, by scale, equal on all ranks."""
        return {}

    def calibrate(self, batches: Iterable[torch.Tensor]) -> None:
        """Measure on training images (local batches) what a generator must know; every rank calls it."""

    def encode_in_bfloat16(self) -> None:
        """Let the encoder of this frozen tokenizer multiply in bfloat16 from now on, several times as fast.

        Codes are searched in float32 still, but of slightly other features, so some of them change.
        """
        in_full_precision = self.encoder.forward

        def in_bfloat16(images_B3HW: torch.Tensor) -> torch.Tensor:
            with torch.autocast(images_B3HW.device.type, torch.bfloat16):
                return in_full_precision(images_B3HW)

        self.encoder.forward = in_bfloat16
        self.encoder.to(memory_format=torch.channels_last)

    def freeze_codes(self) -> None:
        """Train what follows the codes alone, so that every image keeps its codes."""
        self.needs_calibration = False
        self.requires_grad_(False)
        self.post_quant_conv.requires_grad_(True)
        self.decoder.requires_grad_(True)

    def exported(self, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Content of a released file with the weights `state`, in the published layout."""
        return dict(model=state, config=self.config_state(1.))

    def compiled_parts(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    @property
    def fixed_image_size(self) -> int | None:
        """Pixels per side of the only square images that it is made for; None where it takes any."""
        return None

    def check_size(self, images_B3HW: torch.Tensor) -> None:
        """Make sure that the images divide into codes.

        Raises:
            ValueError: a side is no multiple of the stride.
        """
        self.map_size(*images_B3HW.shape[-2:])

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the finest code map of images of this size in pixels.

        Raises:
            ValueError: a side is no multiple of the stride.
        """
        if height % self.stride or width % self.stride or min(height, width) < 1:
            raise ValueError(f'expected images whose sides are multiples of the stride {self.stride}, '
                             f'got {height}x{width}: resize or crop them')
        return height // self.stride, width // self.stride


class ARModel(Trainable):
    """A class-conditional generator over the codes of a frozen tokenizer.

    The tokenizer is kept as a plain reference: it is no part of parameters(), state_dict() or .to().

    Attributes:
        num_classes: classes; index num_classes is the null class of classifier-free guidance.
        class_table: key of the class embedding (num_classes + 1, width) in the state dict.
        parts: parts of the model by the names that `--reset` and `--freeze` take, such as head, each with
            patterns of the names of its parameters.
    """

    num_classes: int
    class_table = 'class_emb.weight'
    parts: dict[str, tuple[str, ...]] = dict(class_emb=('class_emb.*',))

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        object.__setattr__(self, 'tokenizer', tokenizer)

    def training_loss(self, images_B3HW: torch.Tensor, label_B: torch.Tensor,
                      progress: float = 1.) -> tuple[torch.Tensor, dict[str, Any]]:
        """The scalar to minimise, and whatever `metrics` needs.

        A model with `training_flops` also hands over `num_tokens`, the tokens of an image that took part.

        Args:
            images_B3HW: pixels in [-1, 1], or what the tokenizer's `precompute` made of them.
            label_B: class ids, int64.
            progress: fraction of the optimizer steps already done, in [0, 1]; curricula follow it.
        """
        raise NotImplementedError

    def take_largest_steps(self) -> None:
        """From now on let every step at progress 1 take as much memory as any step of a training may; for
        trials, by which nothing is trained."""

    def sharded_parts(self) -> list[nn.Module]:
        """Modules that are called as a whole in a step and need no weights but their own: where weights
        are spread over ranks, those of each are gathered when it is called, and all other weights at once."""
        return []

    def training_flops(self, num_tokens: int) -> int:
        """FLOPs of the products of a training image, forward and backward; 0 where nobody has counted them.

        A multiplication and an addition count as two, the backward pass as twice the forward one, attention
        as if every token saw all others. A frozen tokenizer and what is computed again do not count.

        Args:
            num_tokens: `num_tokens` of what `training_loss` hands to `metrics`.
        """
        return 0

    def metrics(self, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Scalars to log, means over the batch; called on logging steps and for every validation batch."""
        raise NotImplementedError

    @staticmethod
    def tokenizer_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments of the tokenizer that follow from those of this model."""
        return {}

    @staticmethod
    def kwargs_from_config(config: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments in the `config_state` of a checkpoint that its weights do not tell."""
        return {}

    def fit_positions(self, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
        """What of weights of another pyramid must change for that of this model.

        Models that compute their positions, or share one grid between all sizes, have nothing to change.

        Args:
            state: flat weights.
        Returns:
            The entries with other values, and what was done, in words; {} and '' where nothing was.
        """
        return {}, ''

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def rng(self) -> torch.Generator:
        """Generator on the device of the weights, made on first use."""
        if getattr(self, '_rng', None) is None or self._rng.device != self.device:
            self._rng = torch.Generator(self.device)
        return self._rng

    @rng.setter
    def rng(self, generator: torch.Generator | None) -> None:
        self._rng = generator

    @property
    def uniform_prob(self) -> torch.Tensor:
        """(1, num_classes), equal weights for drawing a random class."""
        return torch.full((1, self.num_classes), 1 / self.num_classes, device=self.device)

    def as_labels(self, label_B: int | Sequence[int] | torch.Tensor | None, B: int, rng: Any) -> torch.Tensor:
        """(B,) int64 labels on the model's device.

        Args:
            label_B: an int for all (negative is the null class), one per image, or None for random classes.
        Raises:
            ValueError: wrong number of labels, or one outside [0, num_classes].
        """
        if label_B is None:
            if rng is not None and not isinstance(rng, torch.Generator):
                raise ValueError('random classes need a torch.Generator, got noise keyed by the image index: '
                                 'pass the labels')
            return torch.multinomial(self.uniform_prob, B, replacement=True, generator=rng).reshape(B)
        if isinstance(label_B, int):
            label_B = [self.num_classes if label_B < 0 else label_B] * B
        labels = torch.as_tensor(label_B, dtype=torch.int64, device=self.device)
        if B < 1 or labels.shape != (B,):
            raise ValueError(f'expected one label for each of {B} images, got {tuple(labels.shape)}: '
                             'pass a list or tensor of that length')
        wrong = labels[(labels < 0) | (labels > self.num_classes)]
        if len(wrong):
            raise ValueError(f'expected labels in 0..{self.num_classes} ({self.num_classes} is the null '
                             f'class), got {wrong[0].item()}: pass class ids of this model')
        return labels

    def compile_sampling(self, **options: Any) -> None:
        """Compile what sampling runs again and again: the blocks, and on a GPU the tokenizer's decoder.

        Every shape that occurs is compiled once; keys of weights stay as they are.

        Args:
            options: see `torch.compile`.
        """
        self.compile(**options)
        # On a CPU the convolutions are a library's, compiled or not: that takes minutes and gains nothing.
        if self.device.type != 'cpu':
            self.tokenizer.decoder.compile(**options)

    def init_weights(self, *args, **kwargs) -> None:
        """Every initialisation rule of the paper, in one place."""
        raise NotImplementedError

    @property
    def native_side(self) -> int:
        """Pixels per side of the images that `sample` draws where it is told no size."""
        raise NotImplementedError

    def sample(self, labels: Any, *, guidance: float, rng: Any, **options) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1]; `guidance` is s of `guide`, 1 is off."""
        raise NotImplementedError

    def growing(self, labels: Any, *, guidance: float, rng: Any, **options) -> Iterator[torch.Tensor]:
        """What `sample` draws, as it grows: images in [0, 1] after each scale.

        The last ones are those of `sample`; earlier ones may be smaller, and a model without scales has none.
        Until it is exhausted or closed, the model keeps a cache and serves nothing else.
        """
        yield self.sample(labels, guidance=guidance, rng=rng, **options)

    # ------------------------------------------------------------------------------ for objectives
    @property
    def codes_per_image(self) -> int:
        """Codes of an image over which its likelihood is summed."""
        raise NotImplementedError

    def encoding_of_step(self) -> tuple[Any, ...]:
        """What `tokenizer.encode` takes beside the images of a training step, such as sides drawn for it."""
        return ()

    def log_probabilities(self, label_B: torch.Tensor, tokens: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logarithms (B, L) of the probabilities of all codes, given those before them; float32.

        No label is dropped, no loss is smoothed and no code weighs more than others.

        Args:
            label_B: class ids, int64; `num_classes` is the null class.
            tokens: what `tokenizer.encode` gives.
        Returns:
            The logarithms, and what `metrics` needs.
        """
        raise NotImplementedError

    def draw_tokens(self, label_B: torch.Tensor, rng: Any, *encoding: Any) -> Any:
        """Tokens, as `tokenizer.encode` gives them, from the distribution of the model itself: without
        guidance, and without a filter.

        Args:
            rng: see `sample`.
            encoding: what `encoding_of_step` gave; left out, that of validation.
        """
        raise NotImplementedError
