"""Score what `make demo` made and draw it: report.json, samples.png, reconstructions.png, curves.png.

    python -m bench.demo_report --dir=local_output/demo
"""
import argparse
import json
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.spatial.distance import pdist
from sklearn.svm import SVC
from torchvision.utils import make_grid

from models import VQVAE, CodeUsage, build_tokenizer
from utils.checkpoint import atomic_path, load_file, tokenizer_weights
from utils.data import build_dataset

matplotlib.use('Agg')
from matplotlib import pyplot as plt

# lowest acceptable values
BARS = dict(class_accuracy=0.95, diversity=0.7, tokenizer_psnr=22., svm_real_accuracy=0.96)
# of a curve: folder of the log, key in it, title
CURVES = [('vqvae', 'psnr', 'tokenizer: PSNR [dB]'), ('var', 'L_mean', 'VAR: cross-entropy'),
          ('var', 'acc_mean', 'VAR: token accuracy [%]')]


def stack(dataset) -> tuple[torch.Tensor, np.ndarray]:
    """All images (N, 3, H, W) in [-1, 1] and labels (N,) of a data set."""
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), np.array(labels)


def read_samples(path: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Images (N, 3, H, W) in [-1, 1] and the classes (N,) they were to show, of an npz of sample.py."""
    packed = np.load(path)
    return torch.from_numpy(packed['arr_0']).permute(0, 3, 1, 2).float().div(127.5).sub(1), packed['arr_1']


def fit_judge(images: torch.Tensor, labels: np.ndarray) -> SVC:
    """A classifier of `grey` digits."""
    return SVC(gamma='scale', C=10).fit(grey(images), labels)


def grey(images: torch.Tensor) -> np.ndarray:
    """(N, H * W) in [0, 1], what the judge sees."""
    return images.add(1).div(2).mean(1).flatten(1).numpy()


def within_class_distance(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Mean Euclidean distance between two images of the same class."""
    return float(np.mean([pdist(pixels[labels == label]).mean() for label in np.unique(labels)]))


def draw_rows(path: Path, rows: list[torch.Tensor], names: list[str], title: str) -> None:
    """A grid with one named row of images (n, 3, H, W) in [-1, 1] each."""
    gap, num_columns = 2, len(rows[0])
    tile = rows[0].shape[-1] + gap
    pixels = torch.cat(rows).add(1).div(2).clamp(0, 1)
    picture = make_grid(pixels, nrow=num_columns, padding=gap, pad_value=1.)
    figure, axes = plt.subplots(figsize=(0.45 * num_columns + 1.2, 0.45 * len(rows) + 0.5), dpi=150)
    axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation='nearest')
    axes.set_yticks([tile * (i + 0.5) for i in range(len(rows))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')
    plt.close(figure)


def psnr(images: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean over the images (N, 3, H, W) in [-1, 1], in dB."""
    error_N = (images - targets).div(2).square().flatten(1).mean(1)
    return float(-10 * error_N.log10().mean())


def draw_curves(path: Path, folder: Path, curves: list[tuple[str, str, str]] = CURVES) -> None:
    """Training curves of both models from their log.txt."""
    figure, axes = plt.subplots(1, len(curves), figsize=(12, 3.2), dpi=120)
    for axis, (model, key, title) in zip(axes, curves, strict=True):
        epochs = [json.loads(line) for line in (folder / model / 'log.txt').read_text().splitlines()]
        epochs = [values for values in epochs if key in values]
        axis.plot([values['it'] for values in epochs], [values[key] for values in epochs], label='training')
        # lines repeat the last known validation; its first mention is the step it was made at
        evaluated = {values.get(f'v{key}'): values['it'] for values in reversed(epochs)}
        evaluated.pop(None, None)
        axis.plot(evaluated.values(), evaluated.keys(), 'o-', label='held out', markersize=4)
        axis.set_title(title)
        axis.set_xlabel('optimizer step')
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


def parse_args(description: str, folder: str) -> argparse.Namespace:
    """The command line of a report, `folder` being where its demo writes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--dir', type=Path, default=Path(folder))
    parser.add_argument('--began', type=float, default=None, help='Unix time at which the demo began')
    return parser.parse_args()


def conclude(path: Path, report: dict, bars: dict[str, float]) -> None:
    """Write the report, print what counts, and exit: with 1 if a bar is missed."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + '\n')
    print(json.dumps({name: report[name] for name in (*bars, 'seconds')}, indent=2))
    missed = [f'{name} {report[name]:.3f} < {bar}' for name, bar in bars.items() if report[name] < bar]
    sys.exit(f'demo: {", ".join(missed)}' if missed else 0)


def main() -> None:
    args = parse_args(__doc__, 'local_output/demo')
    _, train_set, val_set = build_dataset('digits', 32, mid_reso=1.)
    (train_images, train_labels), (val_images, val_labels) = stack(train_set), stack(val_set)
    samples, wanted = read_samples(args.dir / 'samples.npz')

    # 1. do the samples show the digits they were asked for, as variously as real ones?
    judge = fit_judge(train_images, train_labels)
    predicted = judge.predict(grey(samples))
    diversity = (within_class_distance(grey(samples), wanted)
                 / within_class_distance(grey(val_images), val_labels))

    # 2. what does the tokenizer keep of digits it never saw?
    path = args.dir / 'vqvae' / 'vae-ckpt-last.pth'
    state, config = tokenizer_weights(load_file(path))
    vae = build_tokenizer(VQVAE, state, str(path), 'cpu', **config)
    idx_kBl = vae.encode(val_images)
    steps = vae.idxBl_to_img(idx_kBl, same_shape=True)
    usage, sides = CodeUsage(vae.vocab_size), vae.quantize.v_patch_nums
    usage.add({f'{side}x{side}': idx_Bl for side, idx_Bl in zip(sides, idx_kBl, strict=True)})

    report = dict(class_accuracy=float((predicted == wanted).mean()), diversity=diversity,
                  tokenizer_psnr=psnr(steps[-1], val_images),
                  svm_real_accuracy=float(judge.score(grey(val_images), val_labels)),
                  num_samples=len(samples), codebook_usage=usage.metrics(),
                  accuracy_per_class=[float((predicted == wanted)[wanted == digit].mean())
                                      for digit in range(10)],
                  seconds=round(time.time() - args.began) if args.began else None)

    draw_rows(args.dir / 'samples.png', [samples[wanted == digit][:16] for digit in range(10)],
              [str(digit) for digit in range(10)], 'digits drawn on request, one class per row')
    first = torch.tensor([int(np.flatnonzero(val_labels == digit)[0]) for digit in range(10)])
    draw_rows(args.dir / 'reconstructions.png', [val_images[first], *(step[first] for step in steps)],
              ['real', *(f'scale {pn}x{pn}' for pn in vae.quantize.v_patch_nums)],
              'held-out digits, coarse to fine')
    draw_curves(args.dir / 'curves.png', args.dir)
    conclude(args.dir / 'report.json', report, BARS)


if __name__ == '__main__':
    main()
