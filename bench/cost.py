"""What a training step and a sampled image of every published run cost, and a model of the time that takes.

`python -m bench.cost` needs no GPU: it counts launches, bytes and FLOPs of the real code on fake tensors of
the published sizes (see `bench.counter`), checks the FLOPs against formulas, and turns the counts into the
shortest time on named cards. The counts are exact, the times are a model, not a measurement.
Letters: B batch, K scales, L all tokens, l tokens of one scale, C width, N weights that multiply tokens, M
weights that multiply the class or the time alone.
"""
import argparse
import functools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import checked, report_header, require_flops, write_json
from bench.counter import (
    CARDS,
    LAUNCH_SECONDS,
    Cost,
    cost_of,
    extrapolated,
    fake_tensors,
    materialized,
    seconds_on,
)
from configs import PRESETS, SAMPLE_PRESETS, SampleConfig, TrainConfig, parse_sampling, parse_training
from models import FAMILIES, NPP, VAR, ARModel, FlexVAR, FlowAR, Tokenizer
from models.base import num_weights
from models.basic_var import num_class_weights
from models.flexvar import FixedSchedule, ScheduleSampler
from models.flowar import annealed_steps, time_grid
from models.noise import ImageNoise
from models.recompute import recomputes
from models.scales import ScaleLayout
from models.tokenizers.conv import AttnBlock, Decoder, Encoder
from trainer import GeneratorTrainer
from training.build import build_optimizer, model_arguments
from utils.amp_sc import autocast

GENERATORS = ('var', 'flexvar', 'npp', 'flowar')
TOKENIZERS = dict(var=dict(ch=160))  # published sizes that are not the constructor's defaults
CLASSES = 1000
DEPTHS = dict(  # arguments of the constructors: how many equal blocks their stacks have
    var=('depth',),
    flexvar=('depth',),
    npp=('n_layer',),
    flowar=('encoder_depth', 'diffloss_d'),  # the trunk's other stack has the same blocks
)
PRECISION = 2  # bfloat16, in which all runs are counted


# ---------------------------------------------------------------------------------------------- runs
def family_of(preset: str) -> str:
    """The generator that a published size is of, such as 'var' for 'var_d30'.

    Raises:
        ValueError: there is no such preset.
    """
    for model in GENERATORS:
        if preset in PRESETS[model] or 'gpt_model' in SAMPLE_PRESETS[model].get(preset, {}):
            return model
    names = [name for model in GENERATORS for name in PRESETS[model]]
    raise ValueError(f'expected a published run, one of {", ".join(names)}, got {preset!r}')


def published_config(preset: str) -> TrainConfig:
    """Settings of a published training; of one that is only published as a file, those of its size."""
    model = family_of(preset)
    if preset in PRESETS[model]:
        return parse_training([f'--model={model}', f'--preset={preset}'])
    size = SAMPLE_PRESETS[model][preset]['gpt_model']
    return parse_training([f'--model={model}', f'--gpt_model={size}'])


def sampling_config(preset: str) -> SampleConfig:
    """Settings of a published sampling."""
    return parse_sampling([f'--model={family_of(preset)}', f'--preset={preset}', '--ckpt=FILE'])


def build_on_meta(config: TrainConfig, depths: Sequence[int] | None = None, **kwargs: Any) -> ARModel:
    """A generator of published size with its tokenizer, without memory.

    Args:
        depths: of its stacks, in place of the published ones, see `DEPTHS`.
        kwargs: further arguments of the constructor that are not as published.
    """
    model_class, tokenizer_class = FAMILIES[config.model]
    arguments = model_arguments(config, config.epochs, 1) | kwargs
    if depths is not None:
        arguments |= dict(zip(DEPTHS[config.model], depths, strict=True))
        if config.model == 'flowar':
            arguments['decoder_depth'] = 1
    with torch.device('meta'):
        tokenizer = tokenizer_class(**TOKENIZERS.get(config.model, {}) | config.tokenizer_kwargs())
        tokenizer.eval().requires_grad_(False)
        return model_class(tokenizer, num_classes=CLASSES, **arguments)


def published_depths(config: TrainConfig) -> tuple[int, ...]:
    """Depths of all stacks of a published model, in the order of `DEPTHS`."""
    arguments = model_arguments(config, config.epochs, 1)
    if config.model == 'flowar':
        num_blocks = arguments['encoder_depth'] + arguments['decoder_depth']
        return num_blocks - 1, arguments['diffloss_d']
    return tuple(arguments[name] for name in DEPTHS[config.model])


@functools.cache
def typical_pyramid(patch_nums: tuple[int, ...]) -> tuple[int, ...]:
    """Of 1,000 pyramids that FlexVAR draws in training, the one whose length is nearest to their mean."""
    rng = random.Random(0)
    drawn = [ScheduleSampler(patch_nums).draw(rng) for _ in range(1000)]
    lengths = [ScaleLayout(sides).total for sides in drawn]
    mean = sum(lengths) / len(lengths)
    return min(drawn, key=lambda sides: abs(ScaleLayout(sides).total - mean))


# ---------------------------------------------------------------------------------------------- counted
def training_cost(config: TrainConfig, batch: int, progress: float = 1., depths: Sequence[int] | None = None,
                  stepping: bool = True, **kwargs: Any) -> Cost:
    """What a training step of one card costs, in bfloat16: tokenizer, model, optimizer and average.

    NPP trains on stored codes, as published. FlexVAR trains on its typical pyramid. Dropout of attention
    weights is left out, since it is a part of the kernel on CUDA and none on the CPU.

    Args:
        batch: images.
        progress: share of the training done, on which the patches of NPP depend.
        depths: of its stacks, see `DEPTHS`; None means the published ones.
        stepping: False stops after the backward pass.
        kwargs: see `build_on_meta`.
    """
    if config.model == 'flowar':
        kwargs = dict(attn_dropout=0.) | kwargs
    model = build_on_meta(config, depths, **kwargs)
    if isinstance(model, FlexVAR):
        model.schedule = FixedSchedule(typical_pyramid(model.patch_nums))
    with fake_tensors():
        materialized(model.tokenizer)
        materialized(model)
        trainer = GeneratorTrainer(model, build_optimizer(config, model, model.no_weight_decay()),
                                   config.ema_decays)
        trainer.optimizer.step_ctx = autocast('cpu', PRECISION)
        trainer.optimizer.scaler = None
        side = config.image_size
        images = torch.empty(batch, 3, side, side)
        if isinstance(model, NPP):
            images = torch.zeros(batch, model.grid ** 2, dtype=torch.int64)
        label_B = torch.zeros(batch, dtype=torch.int64)

        # The first step allocates the moments of the optimizer, so the second one is counted. The gradient is
        # finite: this is what the host is told where it asks.
        def step() -> None:
            trainer.train_step(images, label_B, progress, stepping)

        if stepping:
            cost_of(step, answer=True)
        return cost_of(step, answer=True)


def sampling_cost(preset: str, batch: int, depths: Sequence[int] | None = None) -> Cost:
    """What sampling a batch of a published run costs in bfloat16, with its published settings."""
    model = build_on_meta(published_config(preset), depths).eval()
    options = sampling_config(preset).sample_kwargs()
    with fake_tensors(), torch.no_grad():
        materialized(model.tokenizer)
        materialized(model)
        label_B = torch.zeros(batch, dtype=torch.int64)
        rng = ImageNoise(0, list(range(batch)))
        if isinstance(model, NPP):
            return _npp_cost(model, label_B, rng, options)
        return cost_in_bfloat16(lambda: model.sample(label_B, rng=rng, **options))


def cost_in_bfloat16(run: Callable[[], object]) -> Cost:
    """What one call costs under autocast, which casts every weight once."""
    with autocast('cpu', PRECISION):
        return cost_of(run)


def _npp_cost(model: NPP, label_B: torch.Tensor, rng: ImageNoise, options: dict[str, Any]) -> Cost:
    """What sampling with NPP costs: that of its codes from maps of 4, 9 and 16 codes, and of their decoding.

    Each code sees one more than the one before it, so that costs are parabolas of the number of codes: exact,
    but for a few bytes of positions.
    """
    of_image = ('image_size', 'image_size_eval')
    options = {name: value for name, value in options.items() if name not in of_image}

    def cost_at(grid: int) -> Cost:
        return cost_in_bfloat16(lambda: model.sample_tokens(label_B, rng=rng, grid=grid, **options))

    idx_BN = torch.zeros(len(label_B), model.grid ** 2, dtype=torch.int64)

    def rest() -> None:
        """What `model.sample` does beside drawing codes."""
        model.as_labels(label_B, len(label_B), rng)
        shape = (len(label_B), model.tokenizer.channels, model.grid, model.grid)
        model.tokenizer.decode_code(idx_BN, shape).clamp(-1, 1).add(1).mul(0.5)

    total = cost_in_bfloat16(rest)
    sides = (2, 3, 4)
    for side in sides:
        # Lagrange's interpolation in the number of codes.
        weight = 1.
        for other in sides:
            if other != side:
                weight *= (model.grid ** 2 - other ** 2) / (side ** 2 - other ** 2)
        total = total + cost_at(side) * weight
    return total


# ---------------------------------------------------------------------------------------------- formulas
def step_flops(config: TrainConfig, model: ARModel) -> int:
    """FLOPs of the products of an image of `training_cost` at the end of a training, tokenizer included.

    What `--use_checkpoint` computes again does not count here.
    """
    if isinstance(model, NPP):
        return model.training_flops(model.grid ** 2)
    patch_nums = typical_pyramid(model.patch_nums) if isinstance(model, FlexVAR) else model.layout.patch_nums
    frozen = encode_flops(model.tokenizer, config.image_size, patch_nums)
    return model.training_flops(ScaleLayout(patch_nums).total) + frozen


def sampling_flops(model: ARModel, options: dict[str, Any]) -> int:
    """FLOPs of the products of a sampled image, its decoding included.

    About 4 N L and the attention: two forward passes over every token, which sees all those before it. VAR
    and FlexVAR take one pass where there is no guidance.

    Args:
        options: arguments of `model.sample`; without a guidance there is some.
    """
    if isinstance(model, NPP):
        drawn = npp_flops(model)
        side = model.grid
    elif isinstance(model, FlowAR):
        drawn = _flowar_flops(model, options)
        side = model.layout.patch_nums[-1]
    else:
        layout = ScaleLayout(options.get('infer_patch_nums') or model.patch_nums)
        M = num_class_weights(model)
        N = num_weights(model) - M
        attention = 4 * seen_pairs(layout) * model.C * len(model.blocks)
        num_passes = 1 if options.get('guidance') == 1 else 2
        drawn = num_passes * (2 * N * layout.total + attention + 2 * M)
        side = layout.sizes[-1][0]
        if isinstance(model, VAR):
            # Every scale goes through a convolution of full size on its way to the sum.
            drawn += len(layout.lengths) * conv_flops(model.tokenizer.quantize.quant_resi.phis[0], side)
    return drawn + decoder_flops(model.tokenizer.decoder, side)


def seen_pairs(layout: ScaleLayout) -> int:
    """Pairs of a token and one that it sees: of its own scale and of all before it."""
    return sum((end - begin) * end for begin, end in layout.spans)


def npp_flops(model: NPP) -> int:
    """FLOPs of the products for the codes of an image of NPP with guidance: code i sees i + 1 tokens."""
    num_codes = model.grid ** 2
    pairs = num_codes * (num_codes + 1) // 2
    C = model.norm.weight.numel()
    return 2 * (2 * num_weights(model) * num_codes + 4 * pairs * C * len(model.layers))


def _flowar_flops(model: FlowAR, options: dict[str, Any]) -> int:
    """Of its latent: two passes of the trunk, and of the head as many as the solver asks for."""
    layout = model.layout
    blocks = [*model.encoder_blocks, *model.decoder_blocks]
    M = num_weights(*(block.ada_lin for block in blocks))  # once per scale
    N = num_weights(model) - num_weights(model.flownet) - M
    attention = 4 * seen_pairs(layout) * model.C * len(blocks)
    total = 2 * (2 * N * layout.total + attention + 2 * M * len(layout.lengths))

    # What the head makes of the conditions does not depend on the time.
    head = model.flownet
    of_conditions = num_weights(head.cond_embed)
    if head.cross:
        of_conditions += num_weights(*(block.crossattn.kv for block in head.res_blocks))
    steps = annealed_steps(options['num_steps'], options['lower_steps'], len(layout.lengths))
    for k, (l, num_steps) in enumerate(zip(layout.lengths, steps, strict=True)):
        times = time_grid(num_steps)[:-1].tolist()
        guided = [t for t in times if k > 0 and t <= options['guidance_until']]
        velocity = head.forward_flops(l) - 2 * of_conditions * l
        total += velocity * (len(times) + len(guided)) + 2 * 2 * of_conditions * l
    return total


def encoder_flops(encoder: Encoder, side: int) -> int:
    """FLOPs of the products of an encoder for an image of `side` pixels: 2 times weights times positions."""
    total = conv_flops(encoder.conv_in, side)
    for level in getattr(encoder, encoder.layout.down):
        total += _level_flops(level, side)
        if hasattr(level, 'downsample'):
            side //= 2
            total += conv_flops(level.downsample, side)
    return total + _level_flops(encoder.mid, side) + conv_flops(encoder.conv_out, side)


def decoder_flops(decoder: Decoder, side: int) -> int:
    """The same of a decoder, for a feature map of `side` positions."""
    total = conv_flops(decoder.conv_in, side) + _level_flops(decoder.mid, side)
    levels = list(getattr(decoder, decoder.layout.up))
    if not decoder.layout.deepest_first:
        levels.reverse()
    for level in levels:
        total += _level_flops(level, side)
        if hasattr(level, 'upsample'):
            side *= 2
            total += conv_flops(level.upsample, side)
    return total + conv_flops(decoder.conv_out, side)


def conv_flops(module: nn.Module, side: int) -> int:
    """Of all convolutions inside, whose results have `side` x `side` positions."""
    weights = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Conv2d))
    return 2 * weights * side * side


def _level_flops(level: nn.Module, side: int) -> int:
    """Residual blocks and attention of one resolution."""
    flops = 0
    for name, part in level.named_children():
        if name not in ('downsample', 'upsample'):
            flops += conv_flops(part, side)
    for part in level.modules():
        if isinstance(part, AttnBlock):
            flops += 4 * side ** 4 * part.proj_out.in_channels
    return flops


def encode_flops(tokenizer: Tokenizer, side: int, patch_nums: Sequence[int] = ()) -> int:
    """Encoder and search of codes for an image of `side` pixels, see `encoder_flops`.

    Args:
        patch_nums: sides of the code maps; without any, those that the tokenizer has by itself.
    """
    flops = encoder_flops(tokenizer.encoder, side)
    if tokenizer.vocab_size is None:  # continuous codes are not searched for
        return flops
    native = (side // tokenizer.stride,)
    patch_nums = tuple(patch_nums) or getattr(tokenizer.quantize, 'v_patch_nums', native)
    return flops + 2 * ScaleLayout(patch_nums).total * tokenizer.vocab_size * tokenizer.channels


# ---------------------------------------------------------------------------------------------- table
def describe(cost: Cost, images: int) -> dict[str, float]:
    """Counts of a cost for the table."""
    return dict(
        images=images,
        launches=round(cost.launches),
        reads=round(cost.reads),
        gigabytes=round(cost.bytes / 1e9, 2),
        tflop=round(cost.flops / 1e12, 3),
        tflop_float32=round(cost.full_flops / 1e12, 3),
        tflop_per_image=round(cost.flops / images / 1e12, 4),
    )


def times(cost: Cost, images: int) -> dict[str, dict[str, float | str]]:
    """Of every card: images/s at best, and what limits them. This is a model, not a measurement."""
    found = {}
    for name, card in CARDS.items():
        seconds = seconds_on(card, cost)
        found[name] = dict(images_per_second=round(images / seconds.total, 1), limit=seconds.limit)
    return found


def row_of_training(preset: str, batch: int) -> dict[str, Any]:
    """A training step on one card."""
    config = published_config(preset)
    model = build_on_meta(config)

    def count() -> Cost:
        return extrapolated(lambda *depths: training_cost(config, batch, depths=depths),
                            published_depths(config))

    # The formula leaves out what is computed again.
    cost = count() if recomputes(model) else checked(preset, count, batch * step_flops(config, model))
    return dict(run=preset, what='training step') | describe(cost, batch) | dict(model=times(cost, batch))


def row_of_sampling(preset: str, batch: int) -> dict[str, Any]:
    """A sampled batch."""
    config = published_config(preset)
    cost = extrapolated(lambda *depths: sampling_cost(preset, batch, depths), published_depths(config))
    options = sampling_config(preset).sample_kwargs()
    require_flops(preset, cost.flops, batch * sampling_flops(build_on_meta(config), options))
    return dict(run=preset, what='sampled batch') | describe(cost, batch) | dict(model=times(cost, batch))


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as text, with images/s of every card."""
    print('Counts of one card, and images/s at best: a model, not a measurement, limited by the largest of')
    print(f'FLOPs / peak, bytes / bandwidth and launches x {LAUNCH_SECONDS * 1e6:.0f} us.')
    columns = dict(images=7, launches=9, reads=6, gigabytes=10, tflop=9, tflop_per_image=16)
    print(' ' * 29 + ''.join(f'{name:>{width}}' for name, width in columns.items()))
    for row in rows:
        counts = ''.join(f'{row[name]:>{width}g}' for name, width in columns.items())
        print(f'{row["run"]:15}{row["what"]:14}{counts}')
        speeds = [f'{name} {time["images_per_second"]:g} ({time["limit"]})'
                  for name, time in row['model'].items()]
        print(f'    {"   ".join(speeds)}')


def main() -> None:
    """Count, print the table and write the report."""
    trained = [name for model in GENERATORS for name in PRESETS[model]]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--presets', nargs='+', default=trained, help='published runs')
    parser.add_argument('--batch', type=int, default=0,
                        help='images of a step on one card; 0 is an eighth of the published batch')
    parser.add_argument('--sampled', type=int, default=16, help='images of a sampled batch')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    rows = []
    for preset in args.presets:
        batch = args.batch or math.ceil(published_config(preset).images_per_step / 8)
        rows.append(row_of_training(preset, batch))
        rows.append(row_of_sampling(preset, args.sampled))
    print_table(rows)
    if args.out:
        report = report_header('cost', torch.device('cpu')) | dict(
            kind='counts, and times of a model, not a measurement',
            cards={name: card._asdict() for name, card in CARDS.items()},
            rows=rows,
        )
        write_json(report, args.out)


if __name__ == '__main__':
    main()
