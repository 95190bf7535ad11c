"""Score what `make demo-npp` made and draw it.

    python -m bench.demo_npp_report --dir=local_output/demo_npp

Writes report.json, comparison.png, samples.png and curves.png: the patch curriculum against next-token
training of at least equal time. Steps of both patch sizes are timed here, in turn: a busy machine hits both.
"""
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

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
from configs import RECIPES
from models import NPP
from sample import load_generator
from trainer import GeneratorTrainer
from training.build import build_optimizer
from utils.checkpoint import load_file
from utils.data import EMBEDDED_SIZE, build_dataset
from utils.token_cache import TokenCache

NAMES = dict(npp='patches of 2x2, then codes', plain='codes alone')
BATCH, REPEATS = 32, 10  # as each process has in the demo
# lowest acceptable values
BARS = dict(class_accuracy=0.9, accuracy_over_plain=-0.005, plain_seconds_over_npp=1., diversity=0.7,
            tokenizer_psnr=26., svm_real_accuracy=0.96)
CURVES = [('vq', 'psnr', 'tokenizer: PSNR [dB]'), ('npp', 'L_mean', 'NPP: cross-entropy'),
          ('plain', 'L_mean', 'codes alone: cross-entropy')]


def step_seconds(model: NPP, settings: dict, cache: TokenCache) -> dict[int, float]:
    """Seconds of a training step by side of the patch."""
    recipe = RECIPES['npp'](**settings)
    tokens, labels = (torch.stack([torch.as_tensor(cache[i][part]) for i in range(BATCH)]) for part in (0, 1))
    trainer, times = GeneratorTrainer(model, build_optimizer(recipe, model, set())), {1: [], 2: []}
    for _ in range(1 + REPEATS):
        for p, seconds in times.items():
            model.phases = ((1., p),)
            begin = time.perf_counter()
            trainer.train_step(tokens, labels, progress=0.)
            seconds.append(time.perf_counter() - begin)
    return {p: statistics.median(seconds[1:]) for p, seconds in times.items()}


def history(folder: Path, seconds: dict[int, float]) -> list[tuple[float, float]]:
    """(seconds of training steps, validation loss) of every evaluation.

    Args:
        seconds: of a step, by side of the patch.
    """
    checkpoint = load_file(folder / 'ar-ckpt-last.pth')
    recipe, steps_per_epoch = RECIPES['npp'](**checkpoint['args']), checkpoint['run']['steps_per_epoch']
    sides = [next(p for end, p in recipe.phases if epoch < end) for epoch in range(recipe.epochs)]
    cost = steps_per_epoch * np.cumsum([seconds[p] for p in sides])
    lines = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    loss = {line['it'] // steps_per_epoch: line['vL_mean'] for line in lines if line.get('vL_mean')}
    evaluated = sorted({*range(recipe.eval_every, recipe.epochs, recipe.eval_every), recipe.epochs})
    return [(float(cost[epoch - 1]), loss[epoch]) for epoch in evaluated]


def draw_comparison(path: Path, logs: dict[str, list[tuple[float, float]]],
                    accuracy: dict[str, float]) -> None:
    """Validation loss by seconds of training, and class accuracies."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=120, width_ratios=[3, 1])
    for i, (name, points) in enumerate(logs.items()):
        axes[0].plot(*zip(*points, strict=True), 'o-', label=NAMES[name], markersize=4)
        axes[1].bar_label(axes[1].bar(i, accuracy[name]), fmt='%.3f')
    axes[0].set_title('cross-entropy of the next code, held-out digits')
    axes[0].set_xlabel('seconds of training steps')
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    axes[1].set_title('class accuracy')
    axes[1].set_xticks(range(len(logs)), list(logs))
    axes[1].margins(y=0.12)
    save_figure(figure, path)


def main() -> None:
    args = parse_args(__doc__, 'local_output/demo_npp')
    _, train_set, val_set = build_dataset('digits', EMBEDDED_SIZE, mid_reso=1.)
    (train_images, train_labels), (small_images, val_labels) = stack(train_set), stack(val_set)
    judge = fit_judge(train_images, train_labels)
    real_distance = within_class_distance(grey(small_images), val_labels)

    # 1. do the samples show the digits they were asked for, as variously as real ones?
    scores, rows = {}, {}
    for name in NAMES:
        large, wanted = read_samples(args.dir / f'samples_{name}.npz')
        samples = F.interpolate(large, (EMBEDDED_SIZE, EMBEDDED_SIZE), mode='area')
        scores[name] = dict(class_accuracy=float((judge.predict(grey(samples)) == wanted).mean()),
                            diversity=within_class_distance(grey(samples), wanted) / real_distance)
        rows |= {f'{name} {digit}': large[wanted == digit][:16] for digit in range(10)}

    # 2. how long did each train, and how good was it when?
    path = args.dir / 'npp' / 'ar-ckpt-last.pth'
    checkpoint = load_file(path)
    model, _ = load_generator('npp', str(path), '', 'raw', torch.device('cpu'))
    vae, side = model.tokenizer, large.shape[-1]
    val_images, _ = stack(build_dataset('digits', side, mid_reso=1.)[2])
    tokenizer_psnr = psnr(vae.decode(vae.encode(val_images)), val_images)
    seconds = step_seconds(model, checkpoint['args'], TokenCache(args.dir / 'codes', hflip=False))
    logs = {name: history(args.dir / name, seconds) for name in NAMES}
    trained = {name: points[-1][0] for name, points in logs.items()}

    report = dict(**scores['npp'], tokenizer_psnr=tokenizer_psnr,
                  accuracy_over_plain=scores['npp']['class_accuracy'] - scores['plain']['class_accuracy'],
                  plain_seconds_over_npp=trained['plain'] / trained['npp'], seconds_of_steps=trained,
                  seconds_per_step={str(p): value for p, value in seconds.items()}, scores=scores,
                  validation_loss={name: points[-1][1] for name, points in logs.items()},
                  svm_real_accuracy=float(judge.score(grey(small_images), val_labels)),
                  num_samples=len(wanted), seconds=round(time.time() - args.began) if args.began else None)
    draw_comparison(args.dir / 'comparison.png', logs,
                    {name: score['class_accuracy'] for name, score in scores.items()})
    draw_rows(args.dir / 'samples.png', list(rows.values()), list(rows), 'one class per row')
    draw_curves(args.dir / 'curves.png', args.dir, CURVES)
    conclude(args.dir / 'report.json', report, BARS)


if __name__ == '__main__':
    main()
