"""Peak memory of a training step on one card: a formula whose coefficients are counted, not guessed.

    memory = resident + gathered + step
    resident = (4 weights + 4 gradients + 8 moments + 4 for each average) bytes per parameter, divided by the
               ranks that share a copy; and 4 bytes per parameter of the frozen tokenizer
    gathered = what a rank holds of the weights and gradients of others while it needs them, where sharded
    step     = max(encoding, c + a * (depth - 2)), everything else that forward and backward pass allocate

c is the peak of a model of the same width with two blocks, and a what one block more adds to it: activations
that are kept for its backward pass. Both are counted on the real code, on fake tensors (see `bench.counter`),
the logits of the chunked loss and lowered copies of weights included. Nothing of it is measured on a card:
the context of CUDA, work space of its libraries and fragments come on top, some GB.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F

from bench.cost import PRECISION, build_on_meta, published_config, published_depths, typical_pyramid
from bench.counter import Cost, cost_of, extrapolated, fake_tensors, materialized
from configs import PRESETS, SAMPLE_PRESETS, TrainConfig
from models import ARModel, FlexVAR
from models.flexvar import FixedSchedule
from models.recompute import set_recompute
from training.build import count_parameters
from utils.amp_sc import autocast

FLOAT32 = 4  # bytes
SIZES = [*PRESETS['var'], *PRESETS['flexvar'], *SAMPLE_PRESETS['npp'], *PRESETS['flowar']]


class Memory(NamedTuple):
    """Bytes on one card at the peak of a step, by what they hold."""
    weights: float
    gradients: float
    moments: float    # of AdamW
    averages: float   # of the weights
    tokenizer: float  # weights of the frozen one
    gathered: float   # weights and gradients of other ranks
    step: float       # activations, logits, what is computed on the way

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


# ---------------------------------------------------------------------------------------------- the step
@contextmanager
def norms_in_float32() -> Iterator[None]:
    """A context in which layer norms are in float32 under autocast, as on CUDA; on the CPU they are not."""
    as_on_cpu = F.layer_norm

    def as_on_cuda(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        with torch.autocast(x.device.type, enabled=False):
            return as_on_cpu(x, *args, **kwargs)

    F.layer_norm = as_on_cuda
    try:
        yield
    finally:
        F.layer_norm = as_on_cpu


def loss_peak(model: ARModel, tokens: torch.Tensor, label_B: torch.Tensor, precision: int,
              keeps_casts: bool = True) -> Cost:
    """What forward and backward pass cost, encoding left out; gradients exist before, as under DDP.

    Args:
        tokens: what the tokenizer's `precompute` makes of images.
        precision: see `utils.amp_sc.autocast`, as `keeps_casts`.
    """
    model.train()

    def step() -> None:
        with autocast('cpu', precision, keeps_casts):
            loss, _ = model.training_loss(tokens, label_B)
        loss.backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return cost_of(step)


def step_bytes(make: Callable[..., ARModel], depths: Sequence[int], batch: int, image_size: int,
               recompute: str | None = None, precision: int = PRECISION, keeps_casts: bool = True) -> float:
    """Most bytes that a step of a deep model allocates, from counts of shallow ones.

    Args:
        make: the model of the stacks' depths that it is called with, on 'meta'.
        depths: of each stack.
        batch: images of a micro-step on one card.
        image_size: pixels per side.
        recompute: see `models.recompute`; None leaves it as the model is made.
        precision, keeps_casts: see `loss_peak`.
    """
    encoded = 0

    def loss_at(*shallow: int) -> Cost:
        nonlocal encoded
        model = make(*shallow)
        if recompute is not None:
            set_recompute(model, recompute)
        if isinstance(model, FlexVAR):
            model.schedule = FixedSchedule(typical_pyramid(model.patch_nums))
        with fake_tensors(), norms_in_float32():
            materialized(model.tokenizer)
            materialized(model)
            images_B3HW = torch.empty(batch, 3, image_size, image_size)
            found = []
            encoded = cost_of(lambda: found.append(model.tokenizer.precompute(images_B3HW))).peak_bytes
            label_B = torch.zeros(batch, dtype=torch.int64)
            return loss_peak(model, found[0], label_B, precision, keeps_casts)

    peak = extrapolated(loss_at, tuple(depths)).peak_bytes
    return max(peak, encoded)


# ---------------------------------------------------------------------------------------------- all of it
def gathered_bytes(model: ARModel) -> float:
    """Weights and gradients that a rank has beside its own shards at the peak of a step.

    Those outside of the blocks are there from the forward pass to the end of the backward pass, with their
    gradients; of the blocks those of one. A second block is on its way now and then, but not at the peak: two
    ranks have measured 5 to 10 % less with it (see `tests/test_memory_model.py`).
    """
    of_parts = [count_parameters(part) for part in model.sharded_parts()]
    of_rest = count_parameters(model) - sum(of_parts)
    return FLOAT32 * 2 * (of_rest + max(of_parts, default=0))


def memory_of(model: ARModel, step: float, num_averages: int, ranks: int = 1) -> Memory:
    """All memory of one card.

    Args:
        model: on 'meta'.
        step: of `step_bytes`.
        num_averages: of the weights.
        ranks: that share a copy of the weights; 1 is a copy on each, as under DDP.
    """
    bytes_per_rank = FLOAT32 * count_parameters(model) / ranks
    return Memory(
        weights=bytes_per_rank,
        gradients=bytes_per_rank,
        moments=2 * bytes_per_rank,
        averages=num_averages * bytes_per_rank,
        tokenizer=FLOAT32 * count_parameters(model.tokenizer),
        gathered=gathered_bytes(model) if ranks > 1 else 0,
        step=step,
    )


def published_step(config: TrainConfig, batch: int, recompute: str | None = None,
                   sharded: bool = False) -> float:
    """`step_bytes` of a published training with `batch` images of a micro-step on each card."""
    def make(*depths: int) -> ARModel:
        # Dropout of attention weights is a part of the kernel on CUDA.
        kwargs = dict(attn_dropout=0.) if config.model == 'flowar' else {}
        return build_on_meta(config, depths, **kwargs)

    return step_bytes(make, published_depths(config), batch, config.image_size, recompute,
                      keeps_casts=not sharded)


LAYOUTS = {  # name of a column -> ranks that share a copy
    'DDP': 1,
    'FSDP2, 8 cards': 8,
    'FSDP2, 64 cards': 64,
}


def rows_of(names: Sequence[str], batch: int) -> Iterator[tuple[str, int, dict[tuple[str, str], Memory]]]:
    """(name, parameters, memory by (layout, what is recomputed)) of published sizes."""
    for name in names:
        config = published_config(name)
        model = build_on_meta(config)
        steps = {(recompute, sharded): published_step(config, batch, recompute, sharded)
                 for recompute in ('none', 'block') for sharded in (False, True)}
        found = {}
        for layout, ranks in LAYOUTS.items():
            for recompute in ('none', 'block'):
                step = steps[recompute, ranks > 1]
                found[layout, recompute] = memory_of(model, step, len(config.ema_decays), ranks)
        yield name, count_parameters(model), found


def print_table(names: Sequence[str], batch: int) -> None:
    """GB of one card for every published size, as a table of Markdown."""
    columns = [f'{layout}{"" if recompute == "none" else ", recomputed"}'
               for layout in LAYOUTS for recompute in ('none', 'block')]
    print('| GB of one card | parameters |', ' | '.join(columns), '|')
    print('|---|---|' + '---|' * len(columns))
    for name, num_parameters, found in rows_of(names, batch):
        totals = ' | '.join(f'{memory.total / 1e9:.1f}' for memory in found.values())
        print(f'| `{name}` | {num_parameters / 1e9:.2f} B | {totals} |', flush=True)
