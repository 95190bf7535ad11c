"""What the patch curriculum saves: steps at every patch size against plain ones; memory of the loss.

    python -m bench.npp_cost --out=bench/results/npp_cost_cpu.json

Whole training steps of a published size on 16x16 stored codes; steps of all patch sizes alternate, so that a
busy machine hits all. The memory is the peak of a process that computes the loss and its gradient once.
"""
import argparse
import json
import resource
import statistics
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn import functional as F

from configs import parse_recipe
from models import NPP, VQModel
from models.npp import patch_loss, patches
from trainer import GeneratorTrainer
from training.build import build_optimizer, model_arguments
from utils.checkpoint import atomic_path
from utils.provenance import device_name, versions

SIDES = (1, 2, 4, 8)
CURRICULA = ((0.5, 2), (0.5, 3), (0.5, 4), (0.67, 4))  # epoch_rate, patch_level
VOCABULARY, GRID = 16384, 16


def replicated_loss(logits_BPV: torch.Tensor, idx_BPM: torch.Tensor) -> torch.Tensor:
    """`patch_loss` in its published form: the logits are repeated for every code."""
    logits_BPMV = logits_BPV.unsqueeze(2).expand(-1, -1, idx_BPM.shape[2], -1)
    return F.cross_entropy(logits_BPMV.reshape(-1, logits_BPV.shape[2]), idx_BPM.flatten())


def peak_of_loss(form: str, p: int, batch: int) -> float:
    """Bytes that the process grows by, for logits and loss and gradient."""
    torch.set_num_threads(1)
    loss = dict(gathered=patch_loss, replicated=replicated_loss)[form]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logits = torch.randn(batch, (GRID // p) ** 2, VOCABULARY, requires_grad=True)
    loss(logits, patches(torch.randint(VOCABULARY, (batch, GRID ** 2)), p)).backward()
    return 1024. * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--gpt_model', default='GPT-B')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--steps', type=int, default=3, help='of every kind')
    parser.add_argument('--loss_batch', type=int, default=32)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    with get_context('spawn').Pool(1, maxtasksperchild=1) as pool:  # each in a process of its own
        forms = [(form, 4, args.loss_batch) for form in ('gathered', 'replicated')]
        memory = {form[0]: pool.apply(peak_of_loss, form) for form in forms}

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    recipe = parse_recipe(['--model=npp', f'--gpt_model={args.gpt_model}', '--mixed_precision=none'])
    torch.manual_seed(0)
    with torch.device(device):
        tokenizer = VQModel(net='tiny', encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), test_mode=True)
        model = NPP(tokenizer, **model_arguments(recipe, 2, 1) | dict(phases=[(1., 1)]))
    trainer = GeneratorTrainer(model, build_optimizer(recipe, model, model.no_weight_decay()))
    idx_BN = torch.randint(VOCABULARY, (args.batch, GRID ** 2), device=device)
    label_B = torch.arange(args.batch, device=device)

    def seconds(p: int) -> float:
        model.phases = ((1., p),)
        begin = time.perf_counter()
        trainer.train_step(idx_BN, label_B, progress=0.)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for p in SIDES:
        seconds(p)
    times = {p: [] for p in SIDES}
    for _ in range(args.steps):
        for p in SIDES:
            times[p].append(seconds(p))
    step = {p: statistics.median(values) for p, values in times.items()}
    ratios = {}
    for rate, level in CURRICULA:
        phases = parse_recipe(['--model=npp', f'--epoch_rate={rate}', f'--patch_level={level}']).phases
        lengths = [end - begin for (end, _), (begin, _) in zip(phases, ((0, 0), *phases), strict=False)]
        cost = sum(length * step[p] for length, (_, p) in zip(lengths, phases, strict=True))
        ratios[f'{rate} level {level}'] = round(cost / (phases[-1][0] * step[1]), 3)
    report = dict(
        command=' '.join(['python', '-m', 'bench.npp_cost', *sys.argv[1:]]), device=device_name(device),
        versions=versions(), threads=torch.get_num_threads(), model=args.gpt_model, batch=args.batch,
        seconds_per_step={str(p): round(value, 3) for p, value in step.items()}, time_over_plain=ratios,
        loss_peak_mib={form: round(peak / 2 ** 20) for form, peak in memory.items()},
        loss_batch=args.loss_batch)
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        with atomic_path(args.out) as temporary:
            temporary.write_text(text + '\n')


if __name__ == '__main__':
    main()
