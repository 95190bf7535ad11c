"""Images/s of the loader on one core, against the published transforms, on JPEG files as in ImageNet.

`python -m bench.data`: files of 500 x 375 pixels are generated, read, resized, cropped to 256 pixels and
made to tensors, by one process with one thread. Further rows have the same images from tar files and from
memory, in turns with the folder, and the loader with a process per core.
"""
import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize, ToTensor

from bench.common import four_digits, ratio_row, report_header, seconds_of, take_turns, write_report
from utils.data import build_dataset, normalize_01_into_pm1
from utils.image_cache import cached_in_memory
from utils.machine import available_cpus
from utils.pack_data import PackSettings, pack

SIDE = 256        # pixels of the crops
MID_RESO = 1.125  # VAR resizes to this multiple of them
SIZE = (500, 375)
QUALITY = 95      # of the files, which then take about as much as those of ImageNet, 110 kB


def write_images(root: Path, count: int) -> float:
    """Write `count` training images and one for validation; returns the mean size of a file in bytes.

    They have soft shapes and some noise, so that they compress about as well as photographs.
    """
    rng = np.random.default_rng(0)
    sizes = []
    for split, number in (('train', count), ('val', 1)):
        folder = root / split / 'class'
        folder.mkdir(parents=True)
        for i in range(number):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            soft = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
            noisy = soft + rng.normal(0, 12, soft.shape)
            path = folder / f'{i:05d}.jpg'
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
            sizes.append(path.stat().st_size)
    return float(np.mean(sizes))


def published_dataset(root: Path) -> Dataset:
    """The published reader and transforms of VAR: torchvision's."""
    def read(path: str) -> Image.Image:
        with open(path, 'rb') as file:
            return Image.open(file).convert('RGB')

    transform = Compose([
        Resize(round(MID_RESO * SIDE), interpolation=InterpolationMode.LANCZOS),
        RandomCrop((SIDE, SIDE)),
        ToTensor(),
        normalize_01_into_pm1,
    ])
    return ImageFolder(str(root / 'train'), transform, loader=read)


def reads(dataset: Dataset) -> Callable[[], None]:
    """A call that reads all images of a data set."""
    def run() -> None:
        for i in range(len(dataset)):
            dataset[i]

    return run


def rows_of_sources(root: Path, count: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the same images from the folder, from tar files and from memory, which take turns.

    Args:
        root: folder of `count` training images.
        repeats: timed calls of each, after one that warms up.
    """
    cpu = torch.device('cpu')
    with tempfile.TemporaryDirectory() as packed:
        pack(PackSettings(str(root), packed))
        _, folder, _ = build_dataset(str(root), SIDE, mid_reso=MID_RESO)
        _, tar, _ = build_dataset(packed, SIDE, mid_reso=MID_RESO)
        memory, = cached_in_memory(folder)
        ways = {'the folder': reads(folder), 'tar files': reads(tar), 'memory': reads(memory)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for run in ways.values():
            run()
        for _ in range(repeats):
            for name, run in ways.items():
                times[name].append(seconds_of(run, cpu))
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append(dict(
            name=f'the same from {name}, in turns; ratio to the folder',
            product_seconds=four_digits(median),
            images_per_second_per_core=four_digits(count / median),
        ) | ratio_row(times['the folder'], seconds))
    return rows


def main() -> None:
    """Time both readers and the loader, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=100)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    cpu = torch.device('cpu')
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_images(Path(folder), args.images)
        _, dataset, _ = build_dataset(folder, SIDE, mid_reso=MID_RESO)
        product = reads(dataset)
        row = take_turns(product, reads(published_dataset(Path(folder))), args.repeats, cpu)
        rows = [dict(
            name=f'{args.images} JPEG of {SIZE[0]} x {SIZE[1]}, {num_bytes / 1e3:.0f} kB, to {SIDE} px',
            images_per_second_per_core=four_digits(args.images / row['product_seconds']),
        ) | row]
        print(rows[0], flush=True)
        for row in rows_of_sources(Path(folder), args.images, args.repeats):
            rows.append(row)
            print(row, flush=True)

        # Loader processes share the cores with nobody here; in a training they do with the ranks.
        num_workers = available_cpus()
        loader = DataLoader(dataset, 16, num_workers=num_workers, persistent_workers=True)
        seconds = min(seconds_of(lambda: list(loader), cpu) for _ in range(args.repeats))
        rows.append(dict(
            name=f'the same by {num_workers} loader processes',
            product_seconds=four_digits(seconds),
            images_per_second_per_core=four_digits(args.images / seconds / num_workers),
        ))
        print(rows[-1], flush=True)
    write_report(report_header('data', cpu) | dict(cores=os.cpu_count(), rows=rows), args.out)


if __name__ == '__main__':
    main()
