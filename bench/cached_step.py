"""Training on stored tokens against training on images, in one run: VAR and FlexVAR, digits and 256 pixels.

`python -m bench.cached_step`: all weights are random, since only time counts. A step is everything from
reading its batch, without loader processes, to the move of the weights. Step by step the two ways take turns,
and the medians are compared. Before anything is timed, their losses must be equal, since both see the same
crops. What is saved is the tokenizer's time, so there is a narrow and a wider tokenizer at each size.
"""
import argparse
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import dist
import train
from bench.common import ratio_row, report_header, require_equal, seconds_of, write_report
from bench.sampling import PATCH_NUMS
from configs import parse_training
from extract import ExtractSettings, extract
from models import VQVAE, FlexVAE, Tokenizer
from trainer import StepInfo
from training.data import build_data

DIGITS_SIDES = (1, 2, 3, 4)  # as in the demo of VAR
STRIDE_8 = (1, 1, 2, 2)      # widths of the levels of a tokenizer for digits, as multiples of the first one
NUM_PHOTOS = 4
PHOTO_SIZE = (500, 375)  # width and height of many images of ImageNet


class Case(NamedTuple):
    """What is trained.

    Attributes:
        name: for the report.
        model: var or flexvar.
        tokenizer: with random weights.
        data_path: see train.py.
        sides: of the code maps.
        batch: images per step.
    """
    name: str
    model: str
    tokenizer: Tokenizer
    data_path: str
    sides: tuple[int, ...]
    batch: int


def write_photos(folder: Path) -> str:
    """JPEG files of smooth colours in one class for each split; the folder."""
    rng = np.random.RandomState(0)
    for split in ('train', 'val'):
        of_class = folder / split / 'photo'
        of_class.mkdir(parents=True)
        for i in range(NUM_PHOTOS):
            colours = Image.fromarray(rng.randint(0, 256, (12, 16, 3), dtype=np.uint8))
            colours.resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(of_class / f'{i:02d}.jpg', quality=90)
    return str(folder)


def cases(folder: Path) -> list[Case]:
    """Both families at both sizes, with two tokenizers each; only the last ones have the published width."""
    photos = write_photos(folder / 'photos')
    var_of_digits = dict(vocab_size=256, z_channels=16, v_patch_nums=DIGITS_SIDES)
    flexvar_of_digits = dict(codebook_size=256, codebook_embed_dim=8)
    flexvar_stride_8 = dict(encoder_ch_mult=STRIDE_8, decoder_ch_mult=STRIDE_8)
    digits = ('digits', DIGITS_SIDES, 64)
    pixels_256 = (photos, PATCH_NUMS, 2)
    return [
        Case('VAR, digits, tiny tokenizer', 'var', VQVAE(net='tiny', **var_of_digits), *digits),
        Case('VAR, digits, 32 channels', 'var', VQVAE(ch=32, ch_mult=STRIDE_8, **var_of_digits), *digits),
        Case('FlexVAR, digits, tiny tokenizer', 'flexvar', FlexVAE(net='tiny', **flexvar_of_digits), *digits),
        Case('FlexVAR, digits, 32 channels', 'flexvar',
             FlexVAE(ch=32, **flexvar_of_digits, **flexvar_stride_8), *digits),
        Case('VAR, 256 pixels, 32 channels', 'var', VQVAE(ch=32), *pixels_256),
        Case('VAR, 256 pixels, published tokenizer', 'var', VQVAE(ch=160), *pixels_256),
        Case('FlexVAR, 256 pixels, 32 channels', 'flexvar', FlexVAE(ch=32), *pixels_256),
        Case('FlexVAR, 256 pixels, published tokenizer', 'flexvar', FlexVAE(), *pixels_256),
    ]


class Steps:
    """One training, step by step.

    Args:
        flags: of train.py.
    """

    def __init__(self, flags: list[str]):
        config = parse_training(flags)
        self.run = train.Run(config, build_data(config))
        self.number = 0

    def __call__(self) -> StepInfo:
        images_B3HW, label_B, _ = next(self.run.batches)
        self.run.set_rates(self.number)
        info = self.run.train_step(images_B3HW, label_B, self.number)
        self.number += 1
        return info


def compare(case: Case, folder: Path, depth: int, repeats: int) -> dict[str, float | str]:
    """Images per second of both ways, and how many times faster stored tokens are.

    Args:
        folder: an empty one.
    Raises:
        SystemExit: the first losses differ.
    """
    # Without mirror images, what a training sees in its first epoch is the first crop of every image.
    side = case.sides[-1] * case.tokenizer.stride
    pn = '_'.join(map(str, case.sides))
    file = folder / 'tokenizer.pth'
    torch.save(case.tokenizer.state_dict(), file)
    cache = folder / 'cache'
    extract(ExtractSettings(
        model=case.model,
        vae_ckpt=str(file),
        data_path=case.data_path,
        cached_path=str(cache),
        image_size=side,
        pn=pn if case.model == 'var' else '',
        views=1,
        batch_size=32,
        workers=0,
    ))
    flags = [
        f'--model={case.model}',
        f'--vae_ckpt={file}',
        f'--data_path={case.data_path}',
        f'--pn={pn}',
        f'--patch_size={case.tokenizer.stride}',
        f'--depth={depth}',
        f'--bs={case.batch}',
        f'--steps={repeats + 1}',
        '--hflip=0',
        '--seed=0',
        '--workers=0',
    ]
    live = Steps([*flags, f'--output_dir={folder / "live"}'])
    cached = Steps([*flags, f'--output_dir={folder / "cached"}', f'--cached_path={cache}'])

    # On a GPU the features of an image depend on the size of the batch, so that a code may differ.
    device = dist.get_device()
    tolerance = 0. if device.type == 'cpu' else 1e-3
    require_equal(case.name, cached().loss, live().loss, tolerance)
    seconds = {'live': [], 'cached': []}
    for _ in range(repeats):
        seconds['live'].append(seconds_of(live, device))
        seconds['cached'].append(seconds_of(cached, device))

    row = dict(
        name=case.name,
        batch=case.batch,
        live_images_per_second=round(case.batch / statistics.median(seconds['live']), 4),
        cached_images_per_second=round(case.batch / statistics.median(seconds['cached']), 4),
        **ratio_row(seconds['live'], seconds['cached']),
        bytes_per_view=np.load(cache / 'tokens.npy')[0, 0].nbytes,
    )
    print(row, flush=True)
    return row


def main() -> None:
    """Compare all cases and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--depth', type=int, default=2, help='of the generators')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for number, case in enumerate(cases(folder)):
            (folder / str(number)).mkdir()
            rows.append(compare(case, folder / str(number), args.depth, args.repeats))
    header = report_header('cached_step', dist.get_device())
    write_report(header | dict(depth=args.depth, rows=rows), args.out)


if __name__ == '__main__':
    main()
