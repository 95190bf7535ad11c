"""Score and draw what `make demo` has made: report.json, samples.png, reconstructions.png, curves.png.

    python -m bench.demo_var_report --dir=local_output/demo
"""
from bench.common import (
    DIGITS,
    DigitJudge,
    conclude,
    draw_classes,
    draw_curves,
    draw_rows,
    first_of_each_class,
    parse_args,
    psnr,
    read_samples,
    seconds_since,
)
from models import CodeUsage
from pipeline import load

# lowest acceptable values
BARS = dict(class_accuracy=0.95, diversity=0.7, tokenizer_psnr=22., svm_real_accuracy=0.96)
# of each curve: folder of the run, key in its log, title
CURVES = [
    ('vqvae', 'psnr', 'tokenizer: PSNR [dB]'),
    ('var', 'L_mean', 'VAR: cross-entropy'),
    ('var', 'acc_mean', 'VAR: token accuracy [%]'),
]


def main() -> None:
    """Write all files and exit, with an error if a bar is missed."""
    args = parse_args(__doc__, 'local_output/demo')
    judge = DigitJudge()

    # 1. Do the samples show the digits they were asked for, and do they vary as much as real ones?
    samples, wanted = read_samples(args.dir / 'samples.npz')
    is_right = judge.is_right(samples, wanted)

    # 2. How much of a digit that it never saw does the tokenizer keep, and how many codes does it use?
    vae = load(args.dir / 'vqvae' / 'vae-ckpt-last.pth').model
    idx_kBl = vae.encode(judge.real_images)
    after_scale = vae.idxBl_to_img(idx_kBl, same_shape=True)
    sides = vae.quantize.v_patch_nums
    usage = CodeUsage(vae.vocab_size)
    usage.add({f'{side}x{side}': idx_Bl for side, idx_Bl in zip(sides, idx_kBl, strict=True)})

    report = dict(
        class_accuracy=float(is_right.mean()),
        diversity=judge.diversity(samples, wanted),
        tokenizer_psnr=psnr(after_scale[-1], judge.real_images),
        svm_real_accuracy=judge.real_accuracy(),
        num_samples=len(samples),
        codebook_usage=usage.metrics(),
        accuracy_per_class=[float(is_right[wanted == digit].mean()) for digit in DIGITS],
        seconds=seconds_since(args.began),
    )

    # 3. Pictures of both, and how the training went.
    draw_classes(args.dir / 'samples.png', samples, wanted, 'digits drawn on request, one class per row')
    first = first_of_each_class(judge.real_labels)
    draw_rows(
        args.dir / 'reconstructions.png',
        [judge.real_images[first], *(images[first] for images in after_scale)],
        ['real', *(f'scale {side}x{side}' for side in sides)],
        'held-out digits, coarse to fine',
    )
    draw_curves(args.dir / 'curves.png', args.dir, CURVES)
    conclude(args.dir / 'report.json', report, BARS)


if __name__ == '__main__':
    main()
