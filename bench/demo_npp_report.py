"""Score and draw what `make demo-npp` has made.

    python -m bench.demo_npp_report --dir=local_output/demo_npp

Writes report.json, comparison.png, samples.png and curves.png: the patch curriculum against next-token
training of at least equal time. Training steps of both patch sizes are timed here, in alternation, so that a
busy machine slows both down.
"""
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from bench.common import (
    DIGITS,
    DigitJudge,
    conclude,
    draw_curves,
    draw_rows,
    held_out_digits,
    parse_args,
    plt,
    psnr,
    read_samples,
    save_figure,
    seconds_since,
)
from configs import CONFIGS
from models import NPP
from sample import load_generator
from trainer import GeneratorTrainer
from training.build import build_optimizer
from utils.checkpoint import load_file
from utils.data import EMBEDDED_SIZE
from utils.token_cache import TokenCache

NAMES = dict(npp='patches of 2x2, then codes', plain='codes alone')
BATCH = 32    # as each process has in the demo
REPEATS = 10  # timed steps of each patch size
# lowest acceptable values
BARS = dict(
    class_accuracy=0.9,
    accuracy_over_plain=-0.005,
    plain_seconds_over_npp=1.,
    diversity=0.7,
    tokenizer_psnr=26.,
    svm_real_accuracy=0.96,
)
# of each curve: folder of the run, key in its log, title
CURVES = [
    ('vq', 'psnr', 'tokenizer: PSNR [dB]'),
    ('npp', 'L_mean', 'NPP: cross-entropy'),
    ('plain', 'L_mean', 'codes alone: cross-entropy'),
]


def step_seconds(model: NPP, settings: dict, cache: TokenCache) -> dict[int, float]:
    """Median seconds of a training step, by the side of the patch.

    Args:
        settings: of the training that made the model.
        cache: codes to train on.
    """
    config = CONFIGS['npp'](**settings)
    pairs = [cache[i] for i in range(BATCH)]
    tokens = torch.stack([torch.as_tensor(pair[0]) for pair in pairs])
    labels = torch.stack([torch.as_tensor(pair[1]) for pair in pairs])
    trainer = GeneratorTrainer(model, build_optimizer(config, model, set()))

    # The first step of each size is a warm-up.
    times = {1: [], 2: []}
    for _ in range(1 + REPEATS):
        for p, seconds in times.items():
            model.phases = ((1., p),)
            begin = time.perf_counter()
            trainer.train_step(tokens, labels, progress=0.)
            seconds.append(time.perf_counter() - begin)
    return {p: statistics.median(seconds[1:]) for p, seconds in times.items()}


def history(folder: Path, seconds: dict[int, float]) -> list[tuple[float, float]]:
    """Seconds spent in training steps up to each evaluation, and the validation loss it found.

    Args:
        folder: of the run.
        seconds: of one step, by the side of the patch.
    """
    checkpoint = load_file(folder / 'ar-ckpt-last.pth')
    config = CONFIGS['npp'](**checkpoint['args'])
    steps_per_epoch = checkpoint['run']['steps_per_epoch']

    # Seconds up to the end of each epoch: the patch size of an epoch decides what its steps cost.
    sides = [next(p for end, p in config.phases if epoch < end) for epoch in range(config.epochs)]
    elapsed = steps_per_epoch * np.cumsum([seconds[p] for p in sides])

    # Validation losses by epoch; lines of the log repeat the last known one.
    lines = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    loss = {line['it'] // steps_per_epoch: line['vL_mean'] for line in lines if line.get('vL_mean')}
    evaluated = sorted({*range(config.eval_every, config.epochs, config.eval_every), config.epochs})
    return [(float(elapsed[epoch - 1]), loss[epoch]) for epoch in evaluated]


def draw_comparison(path: Path, logs: dict[str, list[tuple[float, float]]],
                    accuracy: dict[str, float]) -> None:
    """Write validation losses by seconds of training, see `history`, and class accuracies."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=120, width_ratios=[3, 1])
    loss_axis, accuracy_axis = axes
    for i, (name, points) in enumerate(logs.items()):
        seconds, losses = zip(*points, strict=True)
        loss_axis.plot(seconds, losses, 'o-', label=NAMES[name], markersize=4)
        bar = accuracy_axis.bar(i, accuracy[name])
        accuracy_axis.bar_label(bar, fmt='%.3f')
    loss_axis.set_title('cross-entropy of the next code, held-out digits')
    loss_axis.set_xlabel('seconds of training steps')
    loss_axis.grid(alpha=0.3)
    loss_axis.legend()
    accuracy_axis.set_title('class accuracy')
    accuracy_axis.set_xticks(range(len(logs)), list(logs))
    accuracy_axis.margins(y=0.12)
    save_figure(figure, path)


def main() -> None:
    """Write all files and exit, with an error if a bar is missed."""
    args = parse_args(__doc__, 'local_output/demo_npp')
    judge = DigitJudge()

    # 1. Do the samples show the digits they were asked for, and do they vary as much as real ones?
    scores = {}
    rows = {}
    for name in NAMES:
        large, wanted = read_samples(args.dir / f'samples_{name}.npz')
        samples = F.interpolate(large, (EMBEDDED_SIZE, EMBEDDED_SIZE), mode='area')
        scores[name] = dict(
            class_accuracy=judge.accuracy(samples, wanted),
            diversity=judge.diversity(samples, wanted),
        )
        for digit in DIGITS:
            rows[f'{name} {digit}'] = large[wanted == digit][:16]

    # 2. How long did each of both trainings take, and how good was it at which time?
    path = args.dir / 'npp' / 'ar-ckpt-last.pth'
    checkpoint = load_file(path)
    model, _ = load_generator('npp', str(path), '', 'raw', torch.device('cpu'))
    vae = model.tokenizer
    real_images, _ = held_out_digits(large.shape[-1])
    tokenizer_psnr = psnr(vae.decode(vae.encode(real_images)), real_images)
    cache = TokenCache(args.dir / 'codes', hflip=False)
    seconds = step_seconds(model, checkpoint['args'], cache)
    logs = {name: history(args.dir / name, seconds) for name in NAMES}
    trained = {name: points[-1][0] for name, points in logs.items()}
    accuracy = {name: score['class_accuracy'] for name, score in scores.items()}

    report = dict(
        **scores['npp'],
        tokenizer_psnr=tokenizer_psnr,
        accuracy_over_plain=accuracy['npp'] - accuracy['plain'],
        plain_seconds_over_npp=trained['plain'] / trained['npp'],
        seconds_of_steps=trained,
        seconds_per_step={str(p): value for p, value in seconds.items()},
        scores=scores,
        validation_loss={name: points[-1][1] for name, points in logs.items()},
        svm_real_accuracy=judge.real_accuracy(),
        num_samples=len(wanted),
        seconds=seconds_since(args.began),
    )

    # 3. Pictures of both, and how the training went.
    draw_comparison(args.dir / 'comparison.png', logs, accuracy)
    draw_rows(args.dir / 'samples.png', list(rows.values()), list(rows), 'one class per row')
    draw_curves(args.dir / 'curves.png', args.dir, CURVES)
    conclude(args.dir / 'report.json', report, BARS)


if __name__ == '__main__':
    main()
