"""Score what `make demo-flowar` made and draw it.

    python -m bench.demo_flowar_report --dir=local_output/demo_flowar

Writes report.json, comparison.png, samples_uniform.png, samples_debiased.png and curves.png. Compares the two
weightings of the loss at equal steps, then ways to sample: evaluations of the flow head, time and quality.

Letters: B batch, K scales, L all tokens, l tokens of one scale, C width, Z latent channels.
"""
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.demo_report import (
    conclude,
    draw_curves,
    draw_rows,
    fit_judge,
    grey,
    parse_args,
    plt,
    psnr,
    read_samples,
    save_figure,
    stack,
    within_class_distance,
)
from bench.published_solver import both_halves
from evaluation.digits_features import DigitsFeatures
from evaluation.metrics import FeatureStatistics, frechet_distance, to_uint8
from models import FlowAR
from models.noise import ImageNoise
from sample import load_generator
from utils.data import EMBEDDED_SIZE, build_dataset

WEIGHTINGS = ('uniform', 'debiased')
BINS = 10       # of times
GUIDANCE = 1.5  # as of the samples
BATCH, NUM_DRAWN = 100, 300  # digits per batch, and in every setting below
# of the solver: published for S and L, and for H; each with the steps that DiSA recommends
SETTINGS = {'25': dict(num_steps=25), '25 to 15': dict(num_steps=25, lower_steps=15),
            '50, guided to 0.7': dict(num_steps=50, guidance_until=0.7),
            '50 to 15, guided to 0.7': dict(num_steps=50, lower_steps=15, guidance_until=0.7)}
# lowest acceptable values
BARS = dict(class_accuracy=0.95, diversity=0.7, tokenizer_psnr=26., svm_real_accuracy=0.96)
CURVES = [('kl', 'psnr', 'tokenizer: PSNR [dB]'), ('uniform', 'L_mean', 'uniform: velocity error'),
          ('debiased', 'L_mean', 'debiased: velocity error')]


class Judge:
    """Scores of images (N, 3, H, W) in [-1, 1] that were to show certain digits (N,)."""

    def __init__(self, images: torch.Tensor, labels: np.ndarray, real: torch.Tensor,
                 real_labels: np.ndarray):
        """Learns from `images`, and compares with `real`, which it never saw."""
        self.classifier, self.network = fit_judge(images, labels), DigitsFeatures()
        self.real_distance = within_class_distance(grey(real), real_labels)
        self.statistics = self.statistics_of(images)

    def statistics_of(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        statistics = FeatureStatistics(self.network.num_features)
        statistics.add(self.network(to_uint8(images)))
        return statistics.mean, statistics.covariance()

    def accuracy(self, images: torch.Tensor, wanted: np.ndarray) -> float:
        return float(self.classifier.score(grey(images), wanted))

    def scores(self, images: torch.Tensor, wanted: np.ndarray) -> dict[str, float]:
        """Class accuracy, diversity relative to real digits, Frechet distance of digits features."""
        return dict(class_accuracy=self.accuracy(images, wanted),
                    diversity=within_class_distance(grey(images), wanted) / self.real_distance,
                    distance=frechet_distance(*self.statistics_of(images), *self.statistics))


@torch.no_grad()
def error_by_time(model: FlowAR, images: torch.Tensor, labels: np.ndarray) -> list[float]:
    """Mean error of the velocity in the middle of each bin of times; all tokens count the same."""
    target_BLZ, teacher_BLZ = model.pyramid(model.tokenizer.encode_mode(images))
    z_BLC = model(torch.from_numpy(labels), teacher_BLZ)
    noise_BLZ = torch.randn(target_BLZ.shape, generator=torch.Generator().manual_seed(0))
    share_K1 = torch.tensor(model.layout.lengths)[:, None] / model.layout.total
    errors = []
    for i in range(BINS):
        t_KB = torch.full((len(share_K1), len(images)), (i + 0.5) / BINS)
        error_KB = model.velocity_error(target_BLZ, z_BLC, t_KB, noise_BLZ)
        errors.append((share_K1 * error_KB).sum(0).mean().item())
    return errors


def draw_all(model: FlowAR, wanted: np.ndarray, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents of one digit of each class in `wanted`, and what they cost: evaluations per digit, seconds."""
    latents, begin = [], time.perf_counter()
    for first in range(0, len(wanted), BATCH):
        labels, evaluations = torch.from_numpy(wanted[first:first + BATCH]), np.zeros(2, dtype=int)
        for step in model.sample_scales(labels, cfg=GUIDANCE,
                                        rng=ImageNoise(0, range(first, first + len(labels))), **options):
            evaluations += step.evaluations
        latents.append(step.latent_BZnn)
    seconds = time.perf_counter() - begin
    return torch.cat(latents), dict(evaluations_label=int(evaluations[0]), seconds=round(seconds, 2),
                                    evaluations_null=int(evaluations[1]))


def ways_to_sample(model: FlowAR, judge: Judge, wanted: np.ndarray) -> dict[str, dict[str, Any]]:
    """Cost and scores of every setting, with the published solver and with ours."""
    rows = {}
    for name, options in SETTINGS.items():
        with both_halves(model):
            published, cost = draw_all(model, wanted, **options)
        rows[f'{name}, null class at every step'] = cost
        latents, cost = draw_all(model, wanted, **options)
        assert torch.allclose(latents, published, atol=1e-3), (latents - published).abs().max()
        images = torch.cat([model.tokenizer.decode(part) for part in latents.split(BATCH)])
        rows[name] = cost | judge.scores(images, wanted)
    return rows


def draw_comparison(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Errors by time and scores of both weightings in one picture."""
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.2), dpi=120, width_ratios=[3, 3, 1, 1, 1])
    middles = (np.arange(BINS) + 0.5) / BINS
    for i, (weighting, result) in enumerate(results.items()):
        error = np.array(result['error_by_time'])
        axes[0].plot(middles, error, 'o-', label=weighting, markersize=4)
        axes[1].plot(middles, middles ** 2 * error, 'o-', label=weighting, markersize=4)
        for axis, score in zip(axes[2:], ('class_accuracy', 'diversity', 'distance'), strict=True):
            axis.bar_label(axis.bar(i, result[score]), fmt='%.3f')
            axis.margins(y=0.12)
            axis.set_title(score.replace('_', ' '))
            axis.set_xticks(range(len(results)), list(results))
    for axis, title in zip(axes, ('error of the velocity', 'error of the latent, t² times that'),
                           strict=False):
        axis.set_title(title)
        axis.set_xlabel('time, 1 is noise')
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


def main() -> None:
    args = parse_args(__doc__, 'local_output/demo_flowar')
    _, train_set, val_set = build_dataset('digits', EMBEDDED_SIZE, mid_reso=1.)
    (train_images, train_labels), (val_images, val_labels) = stack(train_set), stack(val_set)
    judge = Judge(train_images, train_labels, val_images, val_labels)

    # 1. what does each weighting learn in equal steps?
    results, models = {}, {}
    for weighting in WEIGHTINGS:
        samples, wanted = read_samples(args.dir / f'samples_{weighting}.npz')
        model, _ = load_generator('flowar', str(args.dir / weighting / 'ar-ckpt-last.pth'), '', 'ema',
                                  torch.device('cpu'))
        models[weighting] = model
        results[weighting] = judge.scores(samples, wanted) | dict(
            error_by_time=error_by_time(model, val_images, val_labels))
        rows = {str(digit): samples[wanted == digit][:16] for digit in range(10)}
        draw_rows(args.dir / f'samples_{weighting}.png', list(rows.values()), list(rows),
                  f'{weighting} weighting, one class per row')
    draw_comparison(args.dir / 'comparison.png', results)

    # 2. what do fewer evaluations of the flow head save, and cost?
    sampling = ways_to_sample(models['uniform'], judge, np.arange(NUM_DRAWN) % 10)

    tokenizer = models['uniform'].tokenizer
    report = dict(**{score: results['uniform'][score] for score in ('class_accuracy', 'diversity')},
                  tokenizer_psnr=psnr(tokenizer.decode(tokenizer.encode_mode(val_images)), val_images),
                  svm_real_accuracy=judge.accuracy(val_images, val_labels), num_samples=len(wanted),
                  weightings=results, sampling=sampling,
                  seconds=round(time.time() - args.began) if args.began else None)
    draw_curves(args.dir / 'curves.png', args.dir, CURVES)
    conclude(args.dir / 'report.json', report, BARS)


if __name__ == '__main__':
    main()
