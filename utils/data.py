"""Image folders, digits and shapes behind one interface; augmentation is keyed by (seed, epoch, image).

Pixels are float32 in [-1, 1], (3, H, W).
"""
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, DatasetFolder
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    RandomCrop,
    RandomHorizontalFlip,
    Resize,
    ToTensor,
)
from torchvision.transforms.functional import ten_crop, to_tensor

from utils.misc import mix_seed

HELD_OUT_EVERY = 5  # every fifth digit is held out for validation
EMBEDDED_SIZE = 32  # pixels per side of digits and shapes


def normalize_01_into_pm1(x: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> [-1, 1]; the argument is left as it is."""
    return x.add(x).add_(-1)


def pil_loader(path: str) -> Image.Image:
    """The RGB image of a file; transparent parts show a white ground.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    try:
        with Path(path).open('rb') as file:
            image = Image.open(file)
            if image.mode.startswith('I'):  # 16-bit grey, which `convert` would clip
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA'):
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')
    except (OSError, SyntaxError) as error:
        raise ValueError(f'expected an image, cannot read {path} ({error}): '
                         'repair or remove the file') from None


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8x8, 16 grey levels), enlarged to RGB images of 32x32.

    Args:
        train: the 1,437 training images, else the 360 held-out ones.
        transform: PIL image -> tensor.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, train: bool, transform: Callable | None = None):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError('--data_path=digits needs scikit-learn: pip install scikit-learn') from None
        digits = load_digits()
        held_out = np.arange(len(digits.target)) % HELD_OUT_EVERY == 0
        chosen = ~held_out if train else held_out
        self.images_u8 = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.targets = digits.target[chosen]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple:
        image = Image.fromarray(self.images_u8[index])
        image = image.resize((EMBEDDED_SIZE, EMBEDDED_SIZE), Image.Resampling.BICUBIC).convert('RGB')
        return self.transform(image) if self.transform else image, int(self.targets[index])


# Masks in [0, 1] of the toy set. u, v: rotated coordinates from the centre; d: distance to it; r: radius;
# n: frequency; q: phase.
SHAPES: dict[str, Callable[..., np.ndarray]] = {
    'disc': lambda u, v, d, r, n, q: _edge(r - d),
    'square': lambda u, v, d, r, n, q: _edge(r - np.maximum(abs(u), abs(v))),
    'triangle': lambda u, v, d, r, n, q: _edge(np.minimum(v + 0.6 * r, 0.8 * r - 0.5 * v - 0.9 * abs(u))),
    'stripes': lambda u, v, d, r, n, q: 0.5 + 0.5 * np.sin(2 * np.pi * n * u + q),
    'checker': lambda u, v, d, r, n, q:
        0.5 + 0.5 * np.sign(np.sin(1.4 * np.pi * n * u + q) * np.sin(1.4 * np.pi * n * v)),
    'ring': lambda u, v, d, r, n, q: _edge(0.06 - abs(d - r)),
    'ramp': lambda u, v, d, r, n, q: np.clip(0.5 + u / 0.9, 0, 1),
    'blob': lambda u, v, d, r, n, q: np.exp(-(d / r) ** 2),
    'cross': lambda u, v, d, r, n, q: np.maximum(_edge(0.35 * r - abs(u)) * _edge(r - abs(v)),
                                                 _edge(0.35 * r - abs(v)) * _edge(r - abs(u))),
    'ripples': lambda u, v, d, r, n, q: 0.5 + 0.5 * np.sin(3 * np.pi * n * d + q),
}


def _edge(t: np.ndarray) -> np.ndarray:
    """0 outside (t < 0), 1 inside, soft over about a pixel."""
    return 1 / (1 + np.exp(-40 * t))


class Shapes(Dataset):
    """A toy set of coloured shapes and patterns, drawn from formulae: 32x32 RGB, class = index mod 10.

    Args:
        train: the 8,000 training images, else 1,024 validation images.
        transform: PIL image -> tensor.
    """

    classes = list(SHAPES)

    def __init__(self, train: bool, transform: Callable | None = None):
        count, seed = (8000, 1) if train else (1024, 2)
        self.targets = np.arange(count) % len(SHAPES)
        self.transform = transform
        rng = np.random.RandomState(seed)  # its numbers are the same in every version of numpy

        def draw(low: float, high: float) -> np.ndarray:
            return rng.uniform(low, high, (count, 1, 1))
        background, colour = rng.uniform(size=(2, count, 1, 1, 3))
        center_x, center_y, radius = draw(0.3, 0.7), draw(0.3, 0.7), draw(0.15, 0.35)
        angle, frequency, phase = draw(0, np.pi), draw(2, 6), draw(0, 2 * np.pi)
        self.images_u8 = np.empty((count, EMBEDDED_SIZE, EMBEDDED_SIZE, 3), np.uint8)
        y, x = (np.mgrid[:EMBEDDED_SIZE, :EMBEDDED_SIZE] + 0.5) / EMBEDDED_SIZE
        for label, mask in enumerate(SHAPES.values()):
            i = self.targets == label
            dx, dy, cos, sin = x - center_x[i], y - center_y[i], np.cos(angle[i]), np.sin(angle[i])
            m = mask(cos * dx + sin * dy, cos * dy - sin * dx, np.hypot(dx, dy),
                     radius[i], frequency[i], phase[i])[..., None]
            pixels = background[i] * (1 - m) + colour[i] * m
            pixels += rng.normal(0, 0.02, pixels.shape)
            self.images_u8[i] = pixels.clip(0, 1) * 255 + 0.5

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple:
        image = Image.fromarray(self.images_u8[index])
        return self.transform(image) if self.transform else image, int(self.targets[index])


EMBEDDED: dict[str, type[Dataset]] = {'digits': Digits, 'toy': Shapes}


# ---------------------------------------------------------------------------------------------- transforms
def adm_resize(image: Image.Image, side: int) -> Image.Image:
    """The shorter side to `side` pixels: halved by box filter while twice as long or more, then bicubic."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of size x size pixels, as in the evaluation of ADM (arXiv 2105.05233)."""
    image = adm_resize(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class AdmRandomCrop:
    """A random square of size x size pixels after `adm_resize` to a side drawn from [size, size / min_ratio].

    Args:
        min_ratio: smallest share of the shorter side that the square may cover.
    """

    def __init__(self, size: int, min_ratio: float = 0.8):
        self.size, self.largest = size, math.ceil(size / min_ratio)

    def __call__(self, image: Image.Image) -> Image.Image:
        image = adm_resize(image, _draw(self.size, self.largest))
        top, left = _draw(0, image.height - self.size), _draw(0, image.width - self.size)
        return image.crop((left, top, left + self.size, top + self.size))


def _draw(low: int, high: int) -> int:
    """Uniform in [low, high], from torch's global generator, which `KeyedAugmentation` seeds."""
    return int(torch.randint(low, high + 1, ()))


def build_transforms(final_reso: int, hflip: bool = False, mid_reso: float = 1.125,
                     crop: str = 'resize') -> tuple[Compose, Compose]:
    """(train, validation) transforms from PIL image to [-1, 1]; training flips first if `hflip`.

    Args:
        final_reso: side of the square crops in pixels.
        crop: 'resize' (VAR): shorter side to round(mid_reso * final_reso) by Lanczos, random or centre crop.
            'adm' (LlamaGen, with mid_reso 1.25): shorter side drawn from [1, mid_reso] * final_reso, random
            crop. 'vae' (MAR): as 'resize' for training. Both validate on the centre crop of ADM.
    Raises:
        ValueError: another crop.
    """
    resize = Resize(round(mid_reso * final_reso), interpolation=InterpolationMode.LANCZOS)
    lanczos = [resize, RandomCrop((final_reso, final_reso))]
    adm_center = [partial(adm_center_crop, size=final_reso)]
    crops = {
        'resize': (lanczos, [resize, CenterCrop((final_reso, final_reso))]),
        'adm': ([AdmRandomCrop(final_reso, 1 / mid_reso)], adm_center),
        'vae': (lanczos, adm_center),
    }
    if crop not in crops:
        raise ValueError(f'--crop must be one of {", ".join(crops)}, got {crop!r}')
    train, val = crops[crop]
    finish = [ToTensor(), normalize_01_into_pm1]
    return Compose([RandomHorizontalFlip()] * hflip + train + finish), Compose(val + finish)


def crop_views(image: Image.Image, size: int, crop_range: float = 0.) -> torch.Tensor:
    """All views (A, 3, size, size) of an image in [-1, 1], those of its mirror image last.

    Args:
        size: side of a view in pixels.
        crop_range: 0 is the centre crop of ADM; any other number is for the four corners and the centre of a
            centre crop that is as many times larger, in the order top left, top right, bottom left, bottom
            right, centre.
    """
    if crop_range:
        views = ten_crop(adm_center_crop(image, int(size * crop_range)), [size])
    else:
        view = adm_center_crop(image, size)
        views = view, ImageOps.mirror(view)
    return torch.stack([normalize_01_into_pm1(to_tensor(view)) for view in views])


def open_split(data_path: str, split: str, transform: Callable | None = None) -> Dataset:
    """One split, 'train' or 'val', of a data set; its items are (image, class id).

    Args:
        data_path: root with `train/<class>/<image>` and `val/<class>/<image>`, or 'digits' or 'toy'; or with
            `train.txt` and `val.txt`, lists of the images in `train/` and `val/`, see `ListedImages`.
        transform: PIL image -> tensor.
    Raises:
        ValueError: the folder is missing or empty.
    """
    if data_path in EMBEDDED:
        return EMBEDDED[data_path](split == 'train', transform)
    folder = Path(data_path) / split
    if not folder.is_dir():
        raise ValueError(f'expected class folders in {folder}, found no such folder: '
                         'pass --data_path=ROOT with ROOT/train and ROOT/val, --data_path=digits or toy')
    listing = folder.with_suffix('.txt')
    if listing.is_file():
        return ListedImages(listing, folder, transform)
    try:
        return ClassFolders(str(folder), loader=pil_loader, extensions=IMG_EXTENSIONS, transform=transform)
    except FileNotFoundError as error:
        raise ValueError(f'expected images in every class folder of {folder}: {error}; '
                         'add images to it or remove the folder') from None


def build_dataset(data_path: str, final_reso: int, hflip: bool = False, mid_reso: float = 1.125,
                  crop: str = 'resize') -> tuple[int, Dataset, Dataset]:
    """(number of classes, training set, validation set).

    Args:
        data_path: see `open_split`. Classes are the folder names in sorted order and must be the same in
            both splits.
        final_reso, hflip, mid_reso, crop: see `build_transforms`.
    Raises:
        ValueError: a folder is missing or empty, or the classes differ.
    """
    train_aug, val_aug = build_transforms(final_reso, hflip, mid_reso, crop)
    train_set, val_set = open_split(data_path, 'train', train_aug), open_split(data_path, 'val', val_aug)
    if isinstance(train_set, ListedImages) != isinstance(val_set, ListedImages):
        raise ValueError(f'expected both train.txt and val.txt in {data_path}, or neither, found one: '
                         'list the images of both, or rename the list to use class folders')
    if train_set.classes != val_set.classes:
        odd = sorted(set(train_set.classes) ^ set(val_set.classes))
        raise ValueError(f'train/ and val/ of {data_path} must hold the same classes, '
                         f'they differ in {odd[:5]} ({len(odd)} in all): add or remove these')
    return len(train_set.classes), train_set, val_set


class ClassFolders(DatasetFolder):
    """One folder of images per class; hidden folders, which notebooks leave behind, are no classes."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted(path.name for path in Path(directory).iterdir()
                         if path.is_dir() and not path.name.startswith('.'))
        if not classes:
            raise FileNotFoundError(f'{directory} holds no class folder')
        return classes, {name: i for i, name in enumerate(classes)}


class ListedImages(Dataset):
    """Images named in a text file, one `path class` per line: how the published FlexVAR reads ImageNet.

    Args:
        listing: the text file; classes are integers from 0 on.
        folder: the paths are relative to it.
        transform: PIL image -> tensor.
    Raises:
        ValueError: a line is not of this form, or there is none.
    """

    def __init__(self, listing: Path, folder: Path, transform: Callable | None = None):
        self.paths, self.targets, self.transform = [], [], transform
        for number, line in enumerate(listing.read_text().splitlines(), start=1):
            path, _, label = line.strip().rpartition(' ')
            if not path or not label.isdecimal():
                raise ValueError(f'expected "path class" in line {number} of {listing}, got {line!r}: '
                                 'correct it, or use class folders without the list')
            self.paths.append(str(folder / path))
            self.targets.append(int(label))
        if not self.paths:
            raise ValueError(f'expected images in {listing}, got an empty list: use class folders without it')
        self.classes = [str(label) for label in range(max(self.targets) + 1)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple:
        image = pil_loader(self.paths[index])
        return self.transform(image) if self.transform else image, self.targets[index]


class KeyedAugmentation(Dataset):
    """Items by (epoch, index), whose random transforms depend on (seed, epoch, index) alone.

    So augmentation is the same for any number of workers and ranks, and after any restart.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            # not torch.manual_seed, which also notes a seed for every device: transforms draw on the CPU
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.dataset[index]
