"""Does a pyramid that changes at every step slow training down? Mixed against fixed, in one run, whole steps.

    python -m bench.flexvar_throughput --out=bench/results/flexvar_throughput_cpu.json
    python -m bench.flexvar_throughput --compile

The fixed pyramid is the drawn one whose length is nearest to the mean, so that both kinds train on equally
many tokens. Steps of both kinds alternate, so that a busy machine slows both down.
"""
import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from bench.common import default_device, report_header, seconds_of, write_report
from models import FlexVAE, FlexVAR
from models.flexvar import FixedSchedule, ScheduleSampler
from models.scales import ScaleLayout, block_causal
from trainer import GeneratorTrainer
from utils.amp_sc import AmpOptimizer
from utils.lr_control import filter_params


def make_trainer(device: torch.device, depth: int, compiled: bool) -> GeneratorTrainer:
    """Trainer in float32 of a FlexVAR of published width, on a small tokenizer; its schedule is fixed."""
    torch.manual_seed(0)
    with torch.device(device):
        tokenizer = FlexVAE(test_mode=True, net='tiny', z_channels=64)
        model = FlexVAR(tokenizer, attn_l2_norm=True, **FlexVAR.published_sizes(depth))
    model.init_weights(init_std=-1)
    model.schedule = FixedSchedule()
    if compiled:
        model.compile()
    names, params, groups = filter_params(model, model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    return GeneratorTrainer(model, AmpOptimizer(0, optimizer, names, params, grad_clip=2.))


def main() -> None:
    """Time steps of both kinds and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--depth', type=int, default=4)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--steps', type=int, default=24, help='of either kind')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    device = default_device()
    trainer = make_trainer(device, args.depth, args.compile)
    images = torch.rand(args.batch, 3, 128, 128, device=device) * 2 - 1
    label_B = torch.arange(args.batch, device=device)

    def step_seconds(sides: tuple[int, ...]) -> float:
        """Seconds of a training step with this pyramid."""
        trainer.model.schedule.sides = sides
        return seconds_of(partial(trainer.train_step, images, label_B, progress=0.), device)

    # Pyramids as training draws them, and the one among them that is nearest to their mean length.
    rng = random.Random(0)
    mixed = [ScheduleSampler().draw(rng) for _ in range(args.steps)]
    lengths = [ScaleLayout(sides).total for sides in mixed]
    mean_length = statistics.mean(lengths)
    fixed = min(mixed, key=lambda sides: abs(ScaleLayout(sides).total - mean_length))

    # After a warm-up, masks are forgotten again: building them belongs to the cost of mixed pyramids.
    for sides in mixed[:3]:
        step_seconds(sides)
    block_causal.cache_clear()
    mixed_seconds = 0.
    fixed_seconds = 0.
    for sides in mixed:
        mixed_seconds += step_seconds(sides)
        fixed_seconds += step_seconds(fixed)
    rate_mixed = args.batch * sum(lengths) / mixed_seconds
    rate_fixed = args.batch * ScaleLayout(fixed).total * args.steps / fixed_seconds

    # How much of that cost is the mask?
    begin = time.perf_counter()
    for sides in mixed:
        ScaleLayout(sides).causal_bias(device)
    mask_seconds = time.perf_counter() - begin

    num_graphs = None
    if args.compile:
        num_graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    report = report_header('flexvar_throughput', device) | dict(
        depth=args.depth,
        batch=args.batch,
        pyramids=len(set(mixed)),
        mean_tokens=mean_length,
        fixed=fixed,
        tokens_per_second_mixed=round(rate_mixed),
        tokens_per_second_fixed=round(rate_fixed),
        ratio=round(rate_mixed / rate_fixed, 3),
        mask_share_of_step=round(mask_seconds / mixed_seconds, 5),
        compiled=args.compile,
        compiled_graphs=num_graphs,
    )
    write_report(report, args.out)


if __name__ == '__main__':
    main()
