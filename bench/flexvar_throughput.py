"""Does a pyramid that changes at every step slow training down? Mixed against fixed, in one run, whole steps.

    python -m bench.flexvar_throughput --out=bench/results/flexvar_throughput_cpu.json
    python -m bench.flexvar_throughput --compile

The fixed pyramid is the drawn one whose length is nearest to their mean, so that both train on equally many
tokens; steps of both alternate, so that a busy machine hits both.
"""
import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch

from models import FlexVAE, FlexVAR
from models.flexvar import ScheduleSampler
from models.scales import ScaleLayout, cached_causal_bias
from trainer import GeneratorTrainer
from utils.amp_sc import AmpOptimizer
from utils.checkpoint import atomic_path
from utils.lr_control import filter_params
from utils.provenance import device_name, versions


class Given:
    """In the place of a `ScheduleSampler`: hands out the pyramid it was given."""

    def draw(self) -> tuple[int, ...]:
        return self.sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--depth', type=int, default=4)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--steps', type=int, default=24, help='of either kind')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(0)
    with torch.device(device):
        tokenizer = FlexVAE(test_mode=True, net='tiny', z_channels=64)
        model = FlexVAR(tokenizer, attn_l2_norm=True, **FlexVAR.published_sizes(args.depth))
    model.init_weights(init_std=-1)
    if args.compile:
        model.compile()
    names, params, groups = filter_params(model, model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    trainer = GeneratorTrainer(model, AmpOptimizer(0, optimizer, names, params, grad_clip=2.))
    images = torch.rand(args.batch, 3, 128, 128, device=device) * 2 - 1
    label_B = torch.arange(args.batch, device=device)
    model.schedule = Given()

    def seconds(sides: tuple[int, ...]) -> float:
        model.schedule.sides = sides
        begin = time.perf_counter()
        trainer.train_step(images, label_B, progress=0.)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    rng = random.Random(0)
    mixed = [ScheduleSampler().draw(rng) for _ in range(args.steps)]
    lengths = [ScaleLayout(sides).total for sides in mixed]
    fixed = min(mixed, key=lambda sides: abs(ScaleLayout(sides).total - statistics.mean(lengths)))
    for sides in mixed[:3]:
        seconds(sides)
    cached_causal_bias.cache_clear()
    times = [(seconds(sides), seconds(fixed)) for sides in mixed]
    rate_mixed = args.batch * sum(lengths) / sum(t for t, _ in times)
    rate_fixed = args.batch * ScaleLayout(fixed).total * args.steps / sum(t for _, t in times)
    begin = time.perf_counter()
    for sides in mixed:
        ScaleLayout(sides).causal_bias(device)
    mask = (time.perf_counter() - begin) / args.steps
    report = dict(
        command=' '.join(['python', '-m', 'bench.flexvar_throughput', *sys.argv[1:]]),
        device=device_name(device), versions=versions(), threads=torch.get_num_threads(),
        depth=args.depth, batch=args.batch, pyramids=len(set(mixed)),
        mean_tokens=statistics.mean(lengths), fixed=fixed,
        tokens_per_second_mixed=round(rate_mixed), tokens_per_second_fixed=round(rate_fixed),
        ratio=round(rate_mixed / rate_fixed, 3),
        mask_share_of_step=round(mask * args.steps / sum(t for t, _ in times), 5), compiled=args.compile,
        compiled_graphs=torch._dynamo.utils.counters['stats']['unique_graphs'] if args.compile else None)
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        with atomic_path(args.out) as temporary:
            temporary.write_text(text + '\n')


if __name__ == '__main__':
    main()
