"""What the reports of several benchmarks share: a judge of digits, pictures, curves, and the report itself.

Letters: N images, 3HW image.
"""
import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy.spatial.distance import pdist
from sklearn.svm import SVC
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from bench.counter import Cost, cost_of, under_one_mask
from evaluation.digits_features import DigitsFeatures
from evaluation.metrics import FeatureStatistics, frechet_distance, to_uint8
from models import ARModel
from models.attention import optional_module
from utils.data import EMBEDDED_SIZE, build_dataset
from utils.files import atomic_path, write_text
from utils.peak import peak_flops
from utils.provenance import device_name, versions

matplotlib.use('Agg')
from matplotlib import pyplot as plt

DIGITS = np.arange(10)


# ---------------------------------------------------------------------------------------------- digits
def stack(dataset: Dataset) -> tuple[torch.Tensor, np.ndarray]:
    """All images (N, 3, H, W) in [-1, 1] and all labels (N,) of a data set."""
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), np.array(labels)


def held_out_digits(side: int) -> tuple[torch.Tensor, np.ndarray]:
    """Images (N, 3, side, side) in [-1, 1] and labels (N,) of the embedded validation digits."""
    _, _, val_set = build_dataset('digits', side, mid_reso=1.)
    return stack(val_set)


def read_samples(path: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Samples of an npz of sample.py.

    Returns:
        images: (N, 3, H, W) float32 in [-1, 1].
        wanted: (N,) classes that the samples were to show.
    """
    packed = np.load(path)
    images_u8 = torch.from_numpy(packed['arr_0']).permute(0, 3, 1, 2)
    return images_u8.float().div(127.5).sub(1), packed['arr_1']


def grey(images: torch.Tensor) -> np.ndarray:
    """Pixels (N, 32 * 32) in [0, 1] that the judge sees of images (N, 3, H, W) in [-1, 1] of any size."""
    if images.shape[-2:] != (EMBEDDED_SIZE, EMBEDDED_SIZE):
        images = F.interpolate(images, size=(EMBEDDED_SIZE, EMBEDDED_SIZE), mode='bilinear', antialias=True)
    return images.add(1).div(2).mean(1).flatten(1).numpy()


def within_class_distance(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Mean Euclidean distance between two images of the same class.

    Args:
        pixels: (N, number of pixels), see `grey`.
        labels: (N,); each class needs at least two images.
    """
    distances = [pdist(pixels[labels == label]).mean() for label in np.unique(labels)]
    return float(np.mean(distances))


class DigitJudge:
    """Reads digits as a person would: a classifier that learned from the embedded training digits.

    Attributes:
        train_images, train_labels: (N, 3, 32, 32) in [-1, 1] and (N,), what it learned from.
        real_images, real_labels: digits that it never saw, the measure of its own accuracy and of diversity.
    """

    def __init__(self):
        _, train_set, val_set = build_dataset('digits', EMBEDDED_SIZE, mid_reso=1.)
        self.train_images, self.train_labels = stack(train_set)
        self.real_images, self.real_labels = stack(val_set)
        self.classifier = SVC(gamma='scale', C=10).fit(grey(self.train_images), self.train_labels)
        self.real_distance = within_class_distance(grey(self.real_images), self.real_labels)

    def is_right(self, images: torch.Tensor, wanted: np.ndarray) -> np.ndarray:
        """(N,) whether each image in [-1, 1] shows the digit that was wanted."""
        return self.classifier.predict(grey(images)) == wanted

    def accuracy(self, images: torch.Tensor, wanted: np.ndarray) -> float:
        """Fraction of images that show the digit that was wanted."""
        return float(self.is_right(images, wanted).mean())

    def real_accuracy(self) -> float:
        """Accuracy on real digits, which limits what samples can reach."""
        return self.accuracy(self.real_images, self.real_labels)

    def diversity(self, images: torch.Tensor, wanted: np.ndarray) -> float:
        """Distance between images of a class, relative to that of real digits; 1 is as varied as these."""
        return within_class_distance(grey(images), wanted) / self.real_distance


class FrechetJudge(DigitJudge):
    """A judge of digits that also measures the Frechet distance from the training digits."""

    def __init__(self):
        super().__init__()
        self.network = DigitsFeatures()
        self.statistics = self.statistics_of(self.train_images)

    def statistics_of(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance of the features of images (N, 3, H, W) in [-1, 1]."""
        statistics = FeatureStatistics(self.network.num_features)
        statistics.add(self.network(to_uint8(images)))
        return statistics.mean, statistics.covariance()

    def scores(self, images: torch.Tensor, wanted: np.ndarray) -> dict[str, float]:
        """Class accuracy, diversity and Frechet distance of images that were to show certain digits (N,)."""
        return dict(
            class_accuracy=self.accuracy(images, wanted),
            diversity=self.diversity(images, wanted),
            distance=frechet_distance(*self.statistics_of(images), *self.statistics),
        )


def first_of_each_class(labels: np.ndarray) -> torch.Tensor:
    """(10,) index of the first image of every digit."""
    return torch.tensor([int(np.flatnonzero(labels == digit)[0]) for digit in DIGITS])


def psnr(images: torch.Tensor, targets: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images (N, 3, H, W) in [-1, 1], its mean over the images."""
    error_N = (images - targets).div(2).square().flatten(1).mean(1)
    return float(-10 * error_N.log10().mean())


# ---------------------------------------------------------------------------------------------- pictures
def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and forget it."""
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')
    plt.close(figure)


def draw_rows(path: Path, rows: list[torch.Tensor], names: Sequence[str], title: str) -> None:
    """Write a grid of images: each row is a batch (n, 3, H, W) in [-1, 1] behind its name."""
    gap = 2
    num_columns = len(rows[0])
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


def draw_classes(path: Path, samples: torch.Tensor, wanted: np.ndarray, title: str) -> None:
    """Write a grid with up to 16 samples (N, 3, H, W) in [-1, 1] of each digit, one digit per row."""
    rows = [samples[wanted == digit][:16] for digit in DIGITS]
    draw_rows(path, rows, [str(digit) for digit in DIGITS], title)


def draw_curves(path: Path, folder: Path, curves: list[tuple[str, str, str]]) -> None:
    """Write training curves from the log.txt of several runs.

    Args:
        folder: where the folders of the runs are.
        curves: folder of the run, key in its log, and title of each curve.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(12, 3.2), dpi=120)
    for axis, (run, key, title) in zip(axes, curves, strict=True):
        lines = [json.loads(line) for line in (folder / run / 'log.txt').read_text().splitlines()]
        lines = [line for line in lines if key in line]
        axis.plot([line['it'] for line in lines], [line[key] for line in lines], label='training')

        # Lines repeat the last known validation; its first mention is the step at which it was made.
        step_of_value = {line.get(f'v{key}'): line['it'] for line in reversed(lines)}
        step_of_value.pop(None, None)
        axis.plot(step_of_value.values(), step_of_value.keys(), 'o-', label='held out', markersize=4)
        axis.set_title(title)
        axis.set_xlabel('optimizer step')
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------- demo reports
def parse_args(description: str, folder: str) -> argparse.Namespace:
    """Command line of the report of a demo: `dir` (Path) and `began` (Unix time or None).

    Args:
        folder: where the demo writes, the default of --dir.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--dir', type=Path, default=Path(folder))
    parser.add_argument('--began', type=float, default=None, help='Unix time at which the demo began')
    return parser.parse_args()


def seconds_since(began: float | None) -> int | None:
    """Whole seconds since a Unix time; None if it is not known."""
    return round(time.time() - began) if began else None


def conclude(path: Path, report: dict[str, Any], bars: dict[str, float]) -> None:
    """Write the report of a demo, print what counts, and exit: with an error if a bar is missed.

    Args:
        bars: lowest acceptable values, by their name in the report.
    """
    write_text(path, json.dumps(report, indent=2) + '\n')
    print(json.dumps({name: report[name] for name in (*bars, 'seconds')}, indent=2))
    missed = [f'{name} {report[name]:.3f} < {bar}' for name, bar in bars.items() if report[name] < bar]
    sys.exit(f'demo: {", ".join(missed)}' if missed else 0)


# ---------------------------------------------------------------------------------------------- timings
def default_device() -> torch.device:
    """The GPU if there is one, otherwise the CPU."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def to_device(model: ARModel, device: torch.device) -> ARModel:
    """The model, with its tokenizer, on a device."""
    model.tokenizer.to(device)
    return model.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock read afterwards includes it."""
    if device.type == 'cuda':
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has done its work."""
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def ratio_row(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times faster one of two ways is, whose calls took turns: median, lowest and highest ratio."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return dict(
        ratio=round(statistics.median(ratios), 3),
        lowest_ratio=round(min(ratios), 3),
        highest_ratio=round(max(ratios), 3),
    )


def compare(name: str, product: Callable[[], object], published: Callable[[], object] | None, repeats: int,
            device: torch.device, dtype: torch.dtype = torch.float32,
            cost: Cost | None = None) -> dict[str, Any]:
    """A row of a table: the product against the published way, which take turns call by call.

    Args:
        published: None where there is no other way than the product's; there is no ratio then.
        repeats: timed calls of each, after one that warms up.
        dtype: of the products, for the peak that MFU compares with.
        cost: of a call of the product, counted before it was compiled; None counts it here.
    Returns:
        Medians in seconds, how many times faster the product is (median, lowest, highest), and of the product
        launches, TFLOP of its products, MFU, bytes that its operations touch per second in GB/s, and MiB that
        a call allocates at its peak: measured on CUDA, counted on the CPU.
    """
    cost = cost or cost_of(product)
    row = dict(name=name) | take_turns(product, published, repeats, device)
    seconds = row['product_seconds']
    row |= dict(
        launches=cost.launches,
        tflop=four_digits(cost.flops / 1e12),
        mfu=four_digits(cost.flops / seconds / peak_flops(device, dtype)),
        bandwidth=four_digits(cost.bytes / seconds / 1e9),
        peak_mib=four_digits(peak_bytes_of(product, device, cost) / 2 ** 20),
    )
    print(row, flush=True)
    return row


def take_turns(product: Callable[[], object], published: Callable[[], object] | None, repeats: int,
               device: torch.device) -> dict[str, float]:
    """Medians in seconds of both ways, call by call in turns, and how many times faster the product is.

    Args:
        published: None leaves out what would be of it.
        repeats: timed calls of each, after one that warms up.
    """
    ways = dict(product=product) | (dict(published=published) if published else {})
    times: dict[str, list[float]] = {way: [] for way in ways}
    for run in ways.values():
        run()
    for _ in range(repeats):
        for way, run in ways.items():
            times[way].append(seconds_of(run, device))
    found = {f'{way}_seconds': four_digits(statistics.median(seconds)) for way, seconds in times.items()}
    if published:
        found |= ratio_row(times['published'], times['product'])
    return found


def four_digits(value: float) -> float:
    """A figure without the digits that are noise."""
    return float(f'{value:.4g}')


def counted(name: str, product: Callable[[], object], flops: float) -> Cost:
    """What a call costs, whose products a formula gives as well; see `checked`."""
    return checked(name, partial(cost_of, product), flops)


def checked(name: str, count: Callable[[], Cost], flops: float) -> Cost:
    """A count, whose products a formula gives as well.

    Raises:
        SystemExit: the two disagree, also under a mask over all tokens, as the formulas take attention.
    """
    cost = count()
    if not agree(cost.flops, flops):
        with under_one_mask():
            require_flops(name, count().flops, flops)
    return cost


def agree(counted: float, formula: float) -> bool:
    """Whether two numbers of FLOPs differ by no more than 1 %."""
    return abs(formula - counted) <= 0.01 * counted


def require_flops(name: str, counted: float, formula: float) -> None:
    """Make sure that a formula gives the FLOPs that were counted, within 1 %.

    Raises:
        SystemExit: it does not. Kernels of optional packages are not counted, and then nothing is compared.
    """
    has_other_kernels = optional_module('flash_attn') or optional_module('xformers')
    if not has_other_kernels and not agree(counted, formula):
        raise SystemExit(f'{name}: the formula gives {formula:.4g} FLOPs, which is more than 1 % off those '
                         f'that were counted, {counted:.4g}')


def peak_bytes_of(run: Callable[[], object], device: torch.device, cost: Cost) -> float:
    """Bytes that a call allocates at its peak: by CUDA's allocator, or as they were counted."""
    if device.type != 'cuda':
        return cost.peak_bytes
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def require_equal(name: str, product: torch.Tensor, published: torch.Tensor, tolerance: float) -> None:
    """Make sure that both ways draw the same.

    Raises:
        SystemExit: they do not.
    """
    difference = (product.double() - published.double()).abs().max().item()
    if difference > tolerance:
        raise SystemExit(f'{name}: the two ways differ by {difference:g}, which is more than {tolerance:g}')


def report_header(module: str, device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code: command line, device, versions, threads.

    Args:
        module: name of the benchmark, as after `python -m bench.`
    """
    # Where results go changes nothing.
    flags = [word for word in sys.argv[1:] if not word.startswith(('--out=', '--plot='))]
    return dict(
        command=' '.join(['python', '-m', f'bench.{module}', *flags]),
        device=device_name(device),
        versions=versions(),
        threads=torch.get_num_threads(),
    )


def write_report(report: dict[str, Any], path: Path | None) -> None:
    """Print a report as JSON, and write it to a file unless `path` is None."""
    print(json.dumps(report, indent=2))
    if path:
        write_json(report, path)


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write a report into a file, whose folder may be missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=2) + '\n')
