"""What the patch curriculum saves: steps at every patch size against plain ones; memory of the loss.

    python -m bench.npp_cost --out=bench/results/npp_cost_cpu.json

Whole training steps of a published size on 16x16 stored codes. Steps of all patch sizes alternate, so that a
busy machine slows all of them down. The memory is the peak of a process that computes the loss and its
gradient once.
Letters: B batch, N codes of an image, P patches, M codes of a patch, V vocabulary; p is the side of a patch.
"""
import argparse
import resource
import statistics
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.common import default_device, report_header, seconds_of, write_report
from configs import parse_training
from models import NPP, VQModel
from models.npp import patch_cross_entropy, patches
from trainer import GeneratorTrainer
from training.build import build_optimizer, model_arguments

SIDES = (1, 2, 4, 8)  # of a patch
CURRICULA = ((0.5, 2), (0.5, 3), (0.5, 4), (0.67, 4))  # epoch_rate, patch_level
VOCABULARY = 16384
GRID = 16  # codes per side of an image


# ---------------------------------------------------------------------------------------------- memory
def replicated_loss(logits_BPV: torch.Tensor, idx_BPM: torch.Tensor) -> torch.Tensor:
    """(B * P * M,): the published form, for which the logits are repeated for every code of a patch."""
    logits_BPMV = logits_BPV.unsqueeze(2).expand(-1, -1, idx_BPM.shape[2], -1)
    return F.cross_entropy(logits_BPMV.reshape(-1, logits_BPV.shape[2]), idx_BPM.flatten(), reduction='none')


def peak_of_loss(form: str, p: int, batch: int) -> float:
    """Bytes by which the peak memory of this process grows for logits, loss and gradient.

    Args:
        form: 'gathered' (ours) or 'replicated' (published).
        p: side of a patch.
        batch: images.
    """
    torch.set_num_threads(1)
    loss = dict(gathered=patch_cross_entropy, replicated=replicated_loss)[form]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logits_BPV = torch.randn(batch, (GRID // p) ** 2, VOCABULARY, requires_grad=True)
    idx_BN = torch.randint(VOCABULARY, (batch, GRID ** 2))
    loss(logits_BPV, patches(idx_BN, p)).mean().backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024. * (after - before)


def loss_memory(batch: int) -> dict[str, float]:
    """Bytes of both forms of the loss with patches of 4x4, each measured in a process of its own."""
    with get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        return {form: pool.apply(peak_of_loss, (form, 4, batch)) for form in ('gathered', 'replicated')}


# ---------------------------------------------------------------------------------------------- time
def step_seconds(device: torch.device, gpt_model: str, batch: int, steps: int) -> dict[int, float]:
    """Median seconds of a training step in float32, by the side of the patch.

    Args:
        gpt_model: name of the published size.
        batch: images of a step.
        steps: timed steps of each patch size.
    """
    config = parse_training(['--model=npp', f'--gpt_model={gpt_model}', '--mixed_precision=none'])
    torch.manual_seed(0)
    with torch.device(device):
        tokenizer = VQModel(net='tiny', encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), test_mode=True)
        kwargs = model_arguments(config, 2, 1) | dict(phases=[(1., 1)])
        model = NPP(tokenizer, **kwargs)
    trainer = GeneratorTrainer(model, build_optimizer(config, model, model.no_weight_decay()))
    idx_BN = torch.randint(VOCABULARY, (batch, GRID ** 2), device=device)
    label_B = torch.arange(batch, device=device)

    # The first step of each size is a warm-up.
    times = {p: [] for p in SIDES}
    for _ in range(1 + steps):
        for p, seconds in times.items():
            model.phases = ((1., p),)
            seconds.append(seconds_of(partial(trainer.train_step, idx_BN, label_B, progress=0.), device))
    return {p: statistics.median(seconds[1:]) for p, seconds in times.items()}


def time_over_plain(rate: float, level: int, seconds: dict[int, float]) -> float:
    """Time of a training with a curriculum over that of next-token training for as many epochs.

    Args:
        rate: fraction of the epochs before the last phase, the published `epoch_rate`.
        level: number of phases, the published `patch_level`.
        seconds: of a step, by the side of the patch.
    """
    phases = parse_training(['--model=npp', f'--epoch_rate={rate}', f'--patch_level={level}']).phases
    total = 0.
    begin = 0
    for end, p in phases:
        total += (end - begin) * seconds[p]
        begin = end
    return total / (begin * seconds[1])


def main() -> None:
    """Measure memory and time, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--gpt_model', default='GPT-B')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--steps', type=int, default=3, help='of every kind')
    parser.add_argument('--loss_batch', type=int, default=32)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    device = default_device()
    memory = loss_memory(args.loss_batch)
    seconds = step_seconds(device, args.gpt_model, args.batch, args.steps)
    ratios = {f'{rate} level {level}': round(time_over_plain(rate, level, seconds), 3)
              for rate, level in CURRICULA}

    report = report_header('npp_cost', device) | dict(
        model=args.gpt_model,
        batch=args.batch,
        seconds_per_step={str(p): round(value, 3) for p, value in seconds.items()},
        time_over_plain=ratios,
        loss_peak_mib={form: round(peak / 2 ** 20) for form, peak in memory.items()},
        loss_batch=args.loss_batch,
    )
    write_report(report, args.out)


if __name__ == '__main__':
    main()
