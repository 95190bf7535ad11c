"""Score and draw what `make demo-flexvar` has made.

    python -m bench.demo_flexvar_report --dir=local_output/demo_flexvar

Writes report.json, samples.png, inpainted.png, reconstructions.png and curves.png.
Letters: B batch, l tokens of one scale, N images, 3HW image.
"""
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
    first_of_each_class,
    held_out_digits,
    parse_args,
    plt,
    psnr,
    read_samples,
    save_figure,
    seconds_since,
)
from models import CodeUsage
from models.editing import box_mask
from models.noise import ImageNoise
from models.scales import scale_name
from sample import load_generator

# The rows of the picture, one npz each. 'samples' has the scales, the size and the shape of training.
SETTINGS = dict(
    steps_4='4 steps',
    samples='5 steps',
    steps_6='6 steps',
    large='1.5x',
    tall='tall',
    wide='wide',
)
GUIDANCE = 2.5  # of in-painting, in the unit of the paper; the samples have the same
# lowest acceptable values
BARS = dict(
    class_accuracy=0.95,
    accuracy_steps_4=0.85,
    accuracy_steps_6=0.85,
    accuracy_large=0.85,
    diversity=0.7,
    tokenizer_psnr=22.,
    svm_real_accuracy=0.96,
)
# of each curve: folder of the run, key in its log, title
CURVES = [
    ('flexvae', 'psnr', 'tokenizer: PSNR [dB]'),
    ('flexvar', 'L_mean', 'FlexVAR: cross-entropy'),
    ('flexvar', 'acc_mean', 'FlexVAR: token accuracy [%]'),
]


def class_strip(samples: torch.Tensor, wanted: np.ndarray, block: int = 150, gap: int = 6) -> torch.Tensor:
    """One strip (3, H, W) of samples (N, 3, H, w) in [-1, 1]: ten blocks, one per digit.

    Args:
        wanted: (N,) digits of the samples.
        block: width of a block in pixels. It is the same for samples of any width, so that the digits of
            several strips stand below each other; a block holds as many samples as fit.
        gap: pixels between blocks.
    """
    height, width = samples.shape[-2:]
    per_block = block // width
    pitch = block // per_block
    strip = torch.ones(3, height, 10 * (block + gap) - gap)
    for digit in DIGITS:
        for i, image in enumerate(samples[wanted == digit][:per_block]):
            left = digit * (block + gap) + i * pitch
            strip[:, :, left:left + width] = image
    return strip


def draw_strips(path: Path, strips: list[torch.Tensor], names: list[str], notes: list[str],
                title: str) -> None:
    """Write strips (3, H, W) in [-1, 1] of one width, each between its name (left) and its note (right)."""
    gap = 4
    padded = torch.cat([F.pad(strip, (0, 0, 0, gap), value=1.) for strip in strips], dim=1)
    centres = []
    top = 0
    for strip in strips:
        height = strip.shape[1]
        centres.append(top + height / 2)
        top += height + gap

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
    """Write all files and exit, with an error if a bar is missed."""
    args = parse_args(__doc__, 'local_output/demo_flexvar')
    judge = DigitJudge()

    # 1. In every setting: do the samples show the digits they were asked for? In that of training: do they
    #    vary as much as real ones?
    drawn = {name: read_samples(args.dir / f'{name}.npz') for name in SETTINGS}
    accuracy = {name: judge.accuracy(*samples_and_wanted) for name, samples_and_wanted in drawn.items()}
    samples, wanted = drawn['samples']
    diversity = judge.diversity(samples, wanted)

    # 2. How much of a digit that it never saw does the tokenizer keep, at every size of its code maps?
    model, _ = load_generator('flexvar', str(args.dir / 'flexvar' / 'ar-ckpt-last.pth'), '', 'ema',
                              torch.device('cpu'))
    vae = model.tokenizer
    sizes = model.layout.sizes
    side = samples.shape[-1]
    real_images, real_labels = held_out_digits(side)
    after_scale = vae.img_to_reconstructed_multi_scale_img(real_images, sizes)
    idx_kBl = vae.encode(real_images, sizes)
    usage = CodeUsage(vae.vocab_size)
    usage.add({scale_name(size): idx_Bl for size, idx_Bl in zip(sizes, idx_kBl, strict=True)})

    # 3. Do held-out digits whose lower half is drawn anew still show their class, and their upper half?
    keep_HW = ~box_mask((side, side), 0.5, 0, 1, 1)

    def inpainted(images: torch.Tensor, labels: np.ndarray, seed: int = 0) -> torch.Tensor:
        """Images in [-1, 1] with a new lower half each."""
        rng = ImageNoise(seed, range(len(labels)))
        return model.edit(images, keep_HW, labels.tolist(), guidance=GUIDANCE, rng=rng).mul(2).sub(1)

    new_images = inpainted(real_images, real_labels)
    half = side // 2

    other_accuracies = {f'accuracy_{name}': value for name, value in accuracy.items() if name != 'samples'}
    report = dict(
        class_accuracy=accuracy['samples'],
        diversity=diversity,
        **other_accuracies,
        inpainted_accuracy=judge.accuracy(new_images, real_labels),
        inpainted_psnr_kept=psnr(new_images[:, :, :half], real_images[:, :, :half]),
        inpainted_psnr_redrawn=psnr(new_images[:, :, half:], real_images[:, :, half:]),
        tokenizer_psnr=psnr(after_scale[-1], real_images),
        svm_real_accuracy=judge.real_accuracy(),
        num_samples={name: len(wanted) for name, (_, wanted) in drawn.items()},
        codebook_usage=usage.metrics(),
        seconds=seconds_since(args.began),
    )

    # 4. Pictures of all three, and how the training went.
    draw_strips(
        args.dir / 'samples.png',
        [class_strip(*drawn[name]) for name in SETTINGS],
        [f'{title}\n{scale_name(drawn[name][0].shape[-2:])}' for name, title in SETTINGS.items()],
        [f'{value:.1%}' for value in accuracy.values()],
        f'one model, trained at {side}x{side} pixels; right: how many of the samples a classifier '
        'reads as the digit asked for',
    )
    first = first_of_each_class(real_labels)
    real = real_images[first]
    draw_rows(
        args.dir / 'inpainted.png',
        [
            real,
            real.where(keep_HW, torch.tensor(0.)),
            inpainted(real, DIGITS, seed=1),
            inpainted(real, DIGITS, seed=2),
            inpainted(real, (DIGITS + 1) % 10),
        ],
        ['held out', 'kept', 'drawn', 'drawn again', 'as next digit'],
        'lower halves drawn to fit the upper ones',
    )
    draw_rows(
        args.dir / 'reconstructions.png',
        [real, *(images[first] for images in after_scale)],
        ['real', *(f'{scale_name(size)} codes' for size in sizes)],
        'held-out digits, every map of codes decoded by itself',
    )
    draw_curves(args.dir / 'curves.png', args.dir, CURVES)
    conclude(args.dir / 'report.json', report, BARS)


if __name__ == '__main__':
    main()
