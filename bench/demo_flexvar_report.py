"""Score what `make demo-flexvar` made and draw it.

    python -m bench.demo_flexvar_report --dir=local_output/demo_flexvar

Writes report.json, samples.png, inpainted.png, reconstructions.png and curves.png.
"""
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
from models import CodeUsage
from models.editing import box_mask
from models.noise import ImageNoise
from models.scales import scale_name
from sample import load_generator
from utils.data import EMBEDDED_SIZE, build_dataset

# rows of the picture, one npz each; 'samples' has the scales, the size and the shape of training
SETTINGS = dict(steps_4='4 steps', samples='5 steps', steps_6='6 steps', large='1.5x', tall='tall',
                wide='wide')
GUIDANCE = 2.5  # of in-painting; the samples have the same, in the unit of the paper
# lowest acceptable values
BARS = dict(class_accuracy=0.95, accuracy_steps_4=0.85, accuracy_steps_6=0.85, accuracy_large=0.85,
            diversity=0.7, tokenizer_psnr=22., svm_real_accuracy=0.96)
CURVES = [('flexvae', 'psnr', 'tokenizer: PSNR [dB]'), ('flexvar', 'L_mean', 'FlexVAR: cross-entropy'),
          ('flexvar', 'acc_mean', 'FlexVAR: token accuracy [%]')]


def judged(images: torch.Tensor) -> np.ndarray:
    """Images (N, 3, H, W) of any size as the judge sees them, see `grey`."""
    size = (EMBEDDED_SIZE, EMBEDDED_SIZE)
    return grey(F.interpolate(images, size=size, mode='bilinear', antialias=True))


def class_strip(samples: torch.Tensor, wanted: np.ndarray, block: int = 150, gap: int = 6) -> torch.Tensor:
    """(3, H, W) strip of samples (N, 3, H, w) in [-1, 1]: ten blocks, one per digit, wide enough for some.

    Args:
        wanted: (N,) digits of the samples.
        block: pixels, equal for strips of any w, so that the digits of several strips are aligned.
        gap: pixels between blocks.
    """
    height, width = samples.shape[-2:]
    pitch = block // (block // width)
    strip = torch.ones(3, height, 10 * (block + gap) - gap)
    for digit in range(10):
        left = digit * (block + gap)
        for i, image in enumerate(samples[wanted == digit][:block // width]):
            strip[:, :, left + i * pitch:left + i * pitch + width] = image
    return strip


def draw_strips(path: Path, strips: list[torch.Tensor], names: list[str], notes: list[str],
                title: str) -> None:
    """Strips (3, H, W) in [-1, 1] of one width below each other, each between its name and its note."""
    gap = 4
    padded = torch.cat([F.pad(strip, (0, 0, 0, gap), value=1.) for strip in strips], dim=1)
    tops = np.cumsum([0] + [strip.shape[1] + gap for strip in strips[:-1]])
    centres = [top + strip.shape[1] / 2 for top, strip in zip(tops, strips, strict=True)]
    figure, axes = plt.subplots(figsize=(13, 13 * padded.shape[1] / padded.shape[2]), dpi=150)
    axes.imshow(padded.add(1).div(2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation='nearest')
    right = axes.secondary_yaxis('right')
    for axis, texts in ((axes, names), (right, notes)):
        axis.set_yticks(centres, texts)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def main() -> None:
    args = parse_args(__doc__, 'local_output/demo_flexvar')
    _, train_set, val_set = build_dataset('digits', EMBEDDED_SIZE, mid_reso=1.)
    (train_images, train_labels), (small_images, val_labels) = stack(train_set), stack(val_set)
    judge = fit_judge(train_images, train_labels)

    # 1. in every setting, do the samples show the digits they were asked for, as variously as real ones?
    drawn = {folder: read_samples(args.dir / f'{folder}.npz') for folder in SETTINGS}
    accuracy = {folder: float((judge.predict(judged(samples)) == wanted).mean())
                for folder, (samples, wanted) in drawn.items()}
    samples, wanted = drawn['samples']
    diversity = (within_class_distance(judged(samples), wanted)
                 / within_class_distance(grey(small_images), val_labels))

    # 2. what does the tokenizer keep of digits it never saw, at every size of its code maps?
    model, _ = load_generator('flexvar', str(args.dir / 'flexvar' / 'ar-ckpt-last.pth'), '', 'ema',
                              torch.device('cpu'))
    vae, sizes = model.tokenizer, model.layout.sizes
    side = samples.shape[-1]
    val_images, _ = stack(build_dataset('digits', side, mid_reso=1.)[2])
    steps = vae.img_to_reconstructed_multi_scale_img(val_images, sizes)
    usage = CodeUsage(vae.vocab_size)
    usage.add({scale_name(size): idx_Bl
               for size, idx_Bl in zip(sizes, vae.encode(val_images, sizes), strict=True)})

    # 3. do held-out digits whose lower half is drawn again still show their class, and their upper half?
    keep_HW = ~box_mask((side, side), 0.5, 0, 1, 1)

    def redraw(images: torch.Tensor, labels: np.ndarray, seed: int = 0) -> torch.Tensor:
        rng = ImageNoise(seed, range(len(labels)))
        return model.edit(images, keep_HW, labels.tolist(), guidance=GUIDANCE, rng=rng).mul(2).sub(1)

    redrawn = redraw(val_images, val_labels)
    report = dict(
        class_accuracy=accuracy['samples'], diversity=diversity,
        **{f'accuracy_{folder}': value for folder, value in accuracy.items() if folder != 'samples'},
        inpainted_accuracy=float(judge.score(judged(redrawn), val_labels)),
        inpainted_psnr_kept=psnr(redrawn[:, :, :side // 2], val_images[:, :, :side // 2]),
        inpainted_psnr_redrawn=psnr(redrawn[:, :, side // 2:], val_images[:, :, side // 2:]),
        tokenizer_psnr=psnr(steps[-1], val_images),
        svm_real_accuracy=float(judge.score(grey(small_images), val_labels)),
        num_samples={folder: len(wanted) for folder, (_, wanted) in drawn.items()},
        codebook_usage=usage.metrics(),
        seconds=round(time.time() - args.began) if args.began else None)

    draw_strips(args.dir / 'samples.png', [class_strip(*drawn[folder]) for folder in SETTINGS],
                [f'{name}\n{scale_name(drawn[folder][0].shape[-2:])}' for folder, name in SETTINGS.items()],
                [f'{value:.1%}' for value in accuracy.values()],
                f'one model, trained at {side}x{side} pixels; right: how many of the samples a classifier '
                'reads as the digit asked for')
    first = torch.tensor([int(np.flatnonzero(val_labels == digit)[0]) for digit in range(10)])
    real, digits = val_images[first], np.arange(10)
    draw_rows(args.dir / 'inpainted.png',
              [real, real.where(keep_HW, torch.tensor(0.)), redraw(real, digits, 1), redraw(real, digits, 2),
               redraw(real, (digits + 1) % 10)],
              ['held out', 'kept', 'drawn', 'drawn again', 'as next digit'],
              'lower halves drawn to fit the upper ones')
    draw_rows(args.dir / 'reconstructions.png', [real, *(step[first] for step in steps)],
              ['real', *(f'{scale_name(size)} codes' for size in sizes)],
              'held-out digits, every map of codes decoded by itself')
    draw_curves(args.dir / 'curves.png', args.dir, CURVES)
    conclude(args.dir / 'report.json', report, BARS)


if __name__ == '__main__':
    main()
