"""Score and draw what `make demo-flowar` has made.

    python -m bench.demo_flowar_report --dir=local_output/demo_flowar

Writes report.json, comparison.png, samples_uniform.png, samples_debiased.png and curves.png. It compares the
two weightings of the loss at equal steps, then ways to sample: evaluations of the flow head, time, quality.

Letters: B batch, K scales, L all tokens, C width, Z latent channels, n side of the latent, N images.
"""
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import (
    FrechetJudge,
    conclude,
    draw_classes,
    draw_curves,
    parse_args,
    plt,
    psnr,
    read_samples,
    save_figure,
    seconds_since,
)
from bench.published_solver import both_halves
from models import FlowAR
from models.noise import ImageNoise
from sample import load_generator

WEIGHTINGS = ('uniform', 'debiased')
BINS = 10        # of times, for the errors of the velocity
GUIDANCE = 1.5   # as the samples have
BATCH = 100      # digits drawn at once
NUM_DRAWN = 300  # digits drawn in each of the settings below
# Of the solver: as published for S and L, and for H; each also with the smaller number of steps of DiSA.
SETTINGS = {
    '25': dict(num_steps=25),
    '25 to 15': dict(num_steps=25, lower_steps=15),
    '50, guided to 0.7': dict(num_steps=50, guidance_until=0.7),
    '50 to 15, guided to 0.7': dict(num_steps=50, lower_steps=15, guidance_until=0.7),
}
# lowest acceptable values
BARS = dict(class_accuracy=0.95, diversity=0.7, tokenizer_psnr=26., svm_real_accuracy=0.96)
# of each curve: folder of the run, key in its log, title
CURVES = [
    ('kl', 'psnr', 'tokenizer: PSNR [dB]'),
    ('uniform', 'L_mean', 'uniform: velocity error'),
    ('debiased', 'L_mean', 'debiased: velocity error'),
]


@torch.no_grad()
def error_by_time(model: FlowAR, images: torch.Tensor, labels: np.ndarray) -> list[float]:
    """Mean error of the velocity in the middle of each of the bins of times; every token counts the same."""
    latent_BZnn = model.tokenizer.encode_mode(images)
    target_BLZ, teacher_BLZ = model.pyramid(latent_BZnn)
    z_BLC = model(torch.from_numpy(labels), teacher_BLZ)
    noise_BLZ = torch.randn(target_BLZ.shape, generator=torch.Generator().manual_seed(0))
    fraction_K1 = torch.tensor(model.layout.lengths)[:, None] / model.layout.total

    # The same noise and the same conditions at all times, so that nothing but the time differs.
    errors = []
    for i in range(BINS):
        t_KB = torch.full((len(fraction_K1), len(images)), (i + 0.5) / BINS)
        error_KB = model.velocity_error(target_BLZ, z_BLC, t_KB, noise_BLZ)
        errors.append((fraction_K1 * error_KB).sum(0).mean().item())
    return errors


def draw_all(model: FlowAR, wanted: np.ndarray, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Draw one digit for each class in `wanted` (N,).

    Args:
        options: of the solver, see `FlowAR.sample_scales`.
    Returns:
        latents: (N, Z, n, n).
        cost: evaluations of the flow head for each digit, with its class and with the null class; seconds.
    """
    latents = []
    begin = time.perf_counter()
    for first in range(0, len(wanted), BATCH):
        labels = torch.from_numpy(wanted[first:first + BATCH])
        rng = ImageNoise(0, range(first, first + len(labels)))
        evaluations = np.zeros(2, dtype=int)  # equal for every batch
        for step in model.sample_scales(labels, cfg=GUIDANCE, rng=rng, **options):
            evaluations += step.evaluations
        latents.append(step.latent_BZnn)
    seconds = time.perf_counter() - begin
    cost = dict(
        evaluations_label=int(evaluations[0]),
        seconds=round(seconds, 2),
        evaluations_null=int(evaluations[1]),
    )
    return torch.cat(latents), cost


def ways_to_sample(model: FlowAR, judge: FrechetJudge, wanted: np.ndarray) -> dict[str, dict[str, Any]]:
    """Cost and scores of every setting, with the published solver and with ours."""
    rows = {}
    for name, options in SETTINGS.items():
        with both_halves(model):
            published, cost = draw_all(model, wanted, **options)
        rows[f'{name}, null class at every step'] = cost

        # Ours evaluates less and draws the same, so one set of scores serves both.
        latents, cost = draw_all(model, wanted, **options)
        assert torch.allclose(latents, published, atol=1e-3), (latents - published).abs().max()
        images = torch.cat([model.tokenizer.decode(part) for part in latents.split(BATCH)])
        rows[name] = cost | judge.scores(images, wanted)
    return rows


def draw_comparison(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write errors by time and scores of both weightings as one picture."""
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.2), dpi=120, width_ratios=[3, 3, 1, 1, 1])
    curve_axes = axes[:2]
    bar_axes = axes[2:]
    times = (np.arange(BINS) + 0.5) / BINS
    for i, (weighting, result) in enumerate(results.items()):
        error = np.array(result['error_by_time'])
        curve_axes[0].plot(times, error, 'o-', label=weighting, markersize=4)
        curve_axes[1].plot(times, times ** 2 * error, 'o-', label=weighting, markersize=4)
        for axis, score in zip(bar_axes, ('class_accuracy', 'diversity', 'distance'), strict=True):
            bar = axis.bar(i, result[score])
            axis.bar_label(bar, fmt='%.3f')
            axis.margins(y=0.12)
            axis.set_title(score.replace('_', ' '))
            axis.set_xticks(range(len(results)), list(results))
    titles = ('error of the velocity', 'error of the latent, t² times that')
    for axis, title in zip(curve_axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel('time, 1 is noise')
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


def main() -> None:
    """Write all files and exit, with an error if a bar is missed."""
    args = parse_args(__doc__, 'local_output/demo_flowar')
    judge = FrechetJudge()

    # 1. What has each weighting learned in equally many steps?
    results = {}
    models = {}
    for weighting in WEIGHTINGS:
        samples, wanted = read_samples(args.dir / f'samples_{weighting}.npz')
        model, _ = load_generator('flowar', str(args.dir / weighting / 'ar-ckpt-last.pth'), '', 'ema',
                                  torch.device('cpu'))
        models[weighting] = model
        results[weighting] = judge.scores(samples, wanted)
        results[weighting]['error_by_time'] = error_by_time(model, judge.real_images, judge.real_labels)
        draw_classes(args.dir / f'samples_{weighting}.png', samples, wanted,
                     f'{weighting} weighting, one class per row')
    draw_comparison(args.dir / 'comparison.png', results)

    # 2. What do fewer evaluations of the flow head save, and what do they cost in quality?
    sampling = ways_to_sample(models['uniform'], judge, np.arange(NUM_DRAWN) % 10)

    # 3. How much of a digit that it never saw does the tokenizer keep?
    tokenizer = models['uniform'].tokenizer
    reconstructions = tokenizer.decode(tokenizer.encode_mode(judge.real_images))

    report = dict(
        class_accuracy=results['uniform']['class_accuracy'],
        diversity=results['uniform']['diversity'],
        tokenizer_psnr=psnr(reconstructions, judge.real_images),
        svm_real_accuracy=judge.real_accuracy(),
        num_samples=len(wanted),
        weightings=results,
        sampling=sampling,
        seconds=seconds_since(args.began),
    )
    draw_curves(args.dir / 'curves.png', args.dir, CURVES)
    conclude(args.dir / 'report.json', report, BARS)


if __name__ == '__main__':
    main()
