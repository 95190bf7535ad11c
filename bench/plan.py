"""Plans a published training on N cards: hours, memory, communication and checkpoints.

    python -m bench.plan --preset=var_d30 --cards=8 --card=H100-SXM
    python -m bench.plan --memory

The second command prints the memory of published sizes, sharded or not (see `bench.memory_model`).
Everything printed is a model, not a measurement: counts of the real code on fake tensors (see `bench.cost`),
divided by the figures of datasheets. Real trainings are slower, and take some memory more for the context of
CUDA, work space and fragments.
"""
import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from bench.common import report_header, write_json
from bench.cost import build_on_meta, published_config, published_depths, training_cost
from bench.counter import CARDS, LAUNCH_SECONDS, Card, Cost, extrapolated, seconds_on
from bench.memory_model import SIZES, print_table
from configs import PRESETS, TrainConfig
from models import NPP, ARModel, FlowAR
from training.build import count_parameters

IMAGES = 1_281_167  # of ImageNet's training set
FLOAT32 = 4         # bytes


def preset_named(name: str) -> str:
    """The preset of a name; of VAR, 'd30' is enough."""
    return f'var_{name}' if f'var_{name}' in PRESETS['var'] else name


# ---------------------------------------------------------------------------------------------- time
def phases_of(config: TrainConfig) -> list[tuple[float, float]]:
    """(share of the training, a moment in it) of every part in which steps cost the same."""
    if config.model != 'npp':
        return [(1., 1.)]
    phases = []
    begin = 0.
    for end, _ in config.phases:
        share = (end - begin) / config.epochs
        phases.append((share, (begin + end) / 2 / config.epochs))
        begin = end
    return phases


def mean_step(config: TrainConfig, batch: int) -> Cost:
    """What a step of one card costs in the mean over the training, with `batch` images."""
    total = Cost()
    for share, progress in phases_of(config):
        step = extrapolated(lambda *depths, at=progress: training_cost(config, batch, at, depths),
                            published_depths(config))
        total = total + step * share
    return total


def exchange(num_parameters: int, cards: int, per_node: int, card: Card, node_link: float,
             ) -> tuple[float, float]:
    """(bytes that a card sends per step, seconds of that) to average float32 gradients in a ring.

    Args:
        per_node: cards of one machine; between machines `node_link` bytes/s per card limit the ring.
    """
    num_bytes = 2 * (cards - 1) / cards * FLOAT32 * num_parameters
    link = card.link if cards <= per_node else min(card.link, node_link)
    return num_bytes, num_bytes / link


# ---------------------------------------------------------------------------------------------- memory
def logits_bytes(model: ARModel, batch: int) -> int:
    """Of the float32 logits of all tokens of a step, one copy; a FlowAR has none."""
    if isinstance(model, FlowAR):
        return 0
    if isinstance(model, NPP):
        return FLOAT32 * batch * model.grid ** 2 * model.vocab_size
    return FLOAT32 * batch * model.L * model.V


def memory_of(config: TrainConfig, model: ARModel, batch: int, cards: int) -> dict[str, float]:
    """GB of one card, part by part.

    The last part is what forward and backward pass allocate at most: activations, logits, and the gradients
    that are there at that time.
    """
    num_parameters = count_parameters(model)
    peak = training_cost(config, batch, stepping=False).peak_bytes
    parts = dict(
        weights=FLOAT32 * num_parameters,
        adamw_moments=2 * FLOAT32 * num_parameters,
        average=FLOAT32 * num_parameters if config.ema else 0,
        exchange_buffers=FLOAT32 * num_parameters if cards > 1 else 0,
        tokenizer=FLOAT32 * count_parameters(model.tokenizer),
        peak_of_step=peak,
    )
    within = dict(gradients=FLOAT32 * num_parameters, logits=logits_bytes(model, batch))
    total = sum(parts.values())
    in_gigabytes = {name: round(num_bytes / 1e9, 2) for name, num_bytes in parts.items()}
    return in_gigabytes | dict(
        total=round(total / 1e9, 2),
        of_the_peak={name: round(num_bytes / 1e9, 2) for name, num_bytes in within.items()},
    )


def smallest_accumulation(config: TrainConfig, model: ARModel, cards: int, card: Card) -> tuple[int, dict]:
    """(--ac, memory) of the fewest micro-steps that fit into the card.

    Raises:
        ValueError: not even one image fits.
    """
    local_batch = math.ceil(config.images_per_step / cards)
    accumulate = 1
    while accumulate <= local_batch:
        memory = memory_of(config, model, math.ceil(local_batch / accumulate), cards)
        if memory['total'] * 1e9 <= card.memory:
            return accumulate, memory
        accumulate *= 2
    raise ValueError(f'expected a card with at least {memory["total"]} GB for one image at a time, got '
                     f'{card.memory / 1e9:g} GB: pass another --card')


# ---------------------------------------------------------------------------------------------- the plan
def checkpoint_bytes(config: TrainConfig, model: ARModel) -> int:
    """Of one checkpoint: weights, two moments, the average if there is one, and the tokenizer."""
    copies = 4 if config.ema else 3
    return FLOAT32 * (copies * count_parameters(model) + count_parameters(model.tokenizer))


def checkpoints(config: TrainConfig, model: ARModel, hours: float, disk: float) -> dict[str, float]:
    """Size and number of the checkpoints of a training that takes `hours`, and the share of time they take.

    Args:
        disk: bytes/s that the first rank writes, which all ranks wait for without `--background_save`.
    """
    num_bytes = checkpoint_bytes(config, model)
    steps, minutes = config.save_steps_minutes
    number = config.epochs
    if minutes:
        number += hours * 60 / minutes
    if steps:
        number += config.epochs * math.ceil(IMAGES / config.images_per_step) / steps
    seconds = number * num_bytes / disk
    return dict(
        gigabytes_each=round(num_bytes / 1e9, 2),
        gigabytes_on_disk=round(3 * num_bytes / 1e9, 2),  # the last one, the one before, and the best
        number=round(number),
        share_of_time=round(seconds / (seconds + hours * 3600), 4),
    )


def plan(preset: str, cards: int, card_name: str, per_node: int, node_link: float, disk: float,
         ) -> dict[str, Any]:
    """Everything about one training; see the arguments of the command line. This is a model."""
    config = published_config(preset)
    card = CARDS[card_name]
    model = build_on_meta(config)
    accumulate, memory = smallest_accumulation(config, model, cards, card)
    batch = math.ceil(config.images_per_step / cards / accumulate)
    step = mean_step(config, batch)
    seconds = seconds_on(card, step)
    sent, exchange_seconds = exchange(count_parameters(model), cards, per_node, card, node_link)

    # Gradients travel while the backward pass runs: the truth lies between all of it hidden and nothing.
    num_steps = config.epochs * math.ceil(IMAGES / config.images_per_step)
    shortest = max(accumulate * seconds.total, exchange_seconds)
    longest = accumulate * seconds.total + exchange_seconds
    hours = [round(num_steps * each / 3600, 1) for each in (shortest, longest)]
    return dict(
        kind='a model, not a measurement',
        preset=preset,
        cards=f'{cards} x {card_name}',
        source=card.source,
        parameters=count_parameters(model),
        epochs=config.epochs,
        steps=num_steps,
        images_per_card_and_micro_step=batch,
        accumulate=accumulate,
        hours=hours,
        card_hours=[round(cards * each) for each in hours],
        step=dict(
            seconds=[round(shortest, 4), round(longest, 4)],
            seconds_of_products=round(accumulate * seconds.products, 4),
            seconds_of_memory=round(accumulate * seconds.memory, 4),
            seconds_of_launches=round(accumulate * seconds.launches, 4),
            limit=seconds.limit,
            launches=round(accumulate * step.launches),
        ),
        memory_gigabytes=memory | dict(of_card=card.memory / 1e9),
        communication=dict(
            gigabytes_sent_per_step=round(sent / 1e9, 3),
            seconds=round(exchange_seconds, 4),
            over_step=round(exchange_seconds / (accumulate * seconds.total), 3),
        ),
        checkpoints=checkpoints(config, model, hours[0], disk),
    )


def main() -> None:
    """Print the plan as JSON, and write it where asked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--preset', default='var_d30', help='a published training, such as flowar_l')
    parser.add_argument('--cards', type=int, default=8)
    parser.add_argument('--card', choices=CARDS, default='H100-SXM')
    parser.add_argument('--per_node', type=int, default=8, help='cards of one machine')
    parser.add_argument('--node_link', type=float, default=50., help='GB/s of a card to other machines')
    parser.add_argument('--disk', type=float, default=1., help='GB/s of writing checkpoints')
    parser.add_argument('--memory', action='store_true', help='print the memory of published sizes')
    parser.add_argument('--sizes', nargs='+', default=SIZES, help='for --memory')
    parser.add_argument('--images', type=int, default=16, help='of a micro-step on one card, for --memory')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    if args.memory:
        print_table(args.sizes, args.images)
        return
    try:
        preset = preset_named(args.preset)
        found = plan(preset, args.cards, args.card, args.per_node, args.node_link * 1e9, args.disk * 1e9)
    except ValueError as error:
        parser.error(str(error))
    print(f'A model, not a measurement: datasheet of {args.card}, {LAUNCH_SECONDS * 1e6:.0f} us a launch.')
    print(json.dumps(found, indent=2))
    if args.out:
        write_json(report_header('plan', torch.device('cpu')) | found, args.out)


if __name__ == '__main__':
    main()
