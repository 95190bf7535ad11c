"""Image folders, packed images, digits and shapes behind one interface; augmentation follows from (seed,
epoch, image).

`build_dataset` returns what a training needs; transforms give float32 pixels (3, H, W) in [-1, 1].
"""
import copy
import hashlib
import logging
import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS, DatasetFolder
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor
from torchvision.transforms.functional import ten_crop, to_tensor

import dist
from utils.drawn_images import DrawnImages, is_npz
from utils.images import (
    ImageError,
    ResizedCrop,
    files_below,
    is_data,
    is_folder,
    read_image,
    resized_part,
)
from utils.misc import mix_seed
from utils.shards import PackedImages, is_packed

logger = logging.getLogger(__name__)

HELD_OUT_EVERY = 5  # every fifth digit is held out for validation
EMBEDDED_SIZE = 32  # pixels per side of digits and shapes
SPLIT_NAMES = {  # the name of a split -> names that people give it, in lower case
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'eval'),
}
OTHER_SPLITS = ('test', 'testing')  # folders that are no classes, either
ONE_CLASS = 'images'   # the class of a folder of images without class folders
MAX_REPLACEMENTS = 20  # images that are tried where one cannot be read, that one included


def normalize_01_into_pm1(x: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] -> [-1, 1]; the argument is left as it is."""
    return x.add(x).add_(-1)


def pil_loader(path: str, upright: bool = True) -> Image.Image:
    """`read_image` under its published name."""
    return read_image(path, upright)


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8x8, 16 grey levels), enlarged to RGB images of 32x32.

    Args:
        train: whether to take the 1,437 training images, or else the 360 that are held out.
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


# Masks in [0, 1] of the toy set, each a formula of six letters. u, v: rotated coordinates from the centre of
# the shape; d: distance to that centre; r: radius; n: frequency; q: phase.
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
        train: whether to take the 8,000 training images, or else the 1,024 for validation.
        transform: PIL image -> tensor.
    """

    classes = list(SHAPES)

    def __init__(self, train: bool, transform: Callable | None = None):
        count = 8000 if train else 1024
        seed = 1 if train else 2
        self.targets = np.arange(count) % len(SHAPES)
        self.transform = transform
        rng = np.random.RandomState(seed)  # its numbers are the same in every version of numpy

        def uniform(low: float, high: float) -> np.ndarray:
            return rng.uniform(low, high, (count, 1, 1))

        # The order of these lines is part of the data set: it decides which image gets which numbers.
        background, colour = rng.uniform(size=(2, count, 1, 1, 3))
        center_x = uniform(0.3, 0.7)
        center_y = uniform(0.3, 0.7)
        radius = uniform(0.15, 0.35)
        angle = uniform(0, np.pi)
        frequency = uniform(2, 6)
        phase = uniform(0, 2 * np.pi)
        self.images_u8 = np.empty((count, EMBEDDED_SIZE, EMBEDDED_SIZE, 3), np.uint8)
        y, x = (np.mgrid[:EMBEDDED_SIZE, :EMBEDDED_SIZE] + 0.5) / EMBEDDED_SIZE
        for label, mask_of in enumerate(SHAPES.values()):
            i = self.targets == label
            dx = x - center_x[i]
            dy = y - center_y[i]
            cos = np.cos(angle[i])
            sin = np.sin(angle[i])
            u = cos * dx + sin * dy
            v = cos * dy - sin * dx
            distance = np.hypot(dx, dy)
            mask = mask_of(u, v, distance, radius[i], frequency[i], phase[i])[..., None]

            # A colour on another one, with a little noise so that no two pixels are quite equal.
            pixels = background[i] * (1 - mask) + colour[i] * mask
            pixels += rng.normal(0, 0.02, pixels.shape)
            self.images_u8[i] = pixels.clip(0, 1) * 255 + 0.5

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple:
        image = Image.fromarray(self.images_u8[index])
        return self.transform(image) if self.transform else image, int(self.targets[index])


EMBEDDED: dict[str, type[Dataset]] = {'digits': Digits, 'toy': Shapes}


# ---------------------------------------------------------------------------------------------- transforms
def adm_crop(image: Image.Image, side: int, size: int,
             place: Callable[[int, int], tuple[int, int]]) -> Image.Image:
    """A square of size x size pixels from an image that is resized as ADM does it.

    The image is halved by a box filter while its shorter side is at least twice `side`, then a bicubic filter
    brings that side to `side` pixels.

    Args:
        image: of mode RGB.
        side: shorter side of the resized image in pixels.
        size: side of the square in pixels.
        place: (height, width) of the resized image -> (top, left) of the square.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    top, left = place(height, width)
    box = (left, top, left + size, top + size)
    return resized_part(image, (width, height), Image.Resampling.BICUBIC, box)


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of size x size pixels, as in the evaluation of ADM (arXiv 2105.05233)."""
    def place(height: int, width: int) -> tuple[int, int]:
        return (height - size) // 2, (width - size) // 2

    return adm_crop(image, size, size, place)


class AdmRandomCrop:
    """A random square of size x size pixels from an image that is resized as ADM does it, to a random side.

    Args:
        size: side of the square in pixels.
        min_ratio: the square covers at least this fraction of the shorter side of the image, so that side is
            random in [size, size / min_ratio].
    """

    def __init__(self, size: int, min_ratio: float = 0.8):
        self.size = size
        self.largest = math.ceil(size / min_ratio)

    def __call__(self, image: Image.Image) -> Image.Image:
        def place(height: int, width: int) -> tuple[int, int]:
            top = _random_int(0, height - self.size)
            left = _random_int(0, width - self.size)
            return top, left

        side = _random_int(self.size, self.largest)
        return adm_crop(image, side, self.size, place)


def _random_int(low: int, high: int) -> int:
    """Uniform in [low, high], from torch's global generator, which `KeyedAugmentation` seeds."""
    return int(torch.randint(low, high + 1, ()))


def _random_place(height: int, width: int, size: int) -> tuple[int, int]:
    """Where torchvision's `RandomCrop` of this size would begin, by the same random numbers."""
    top, left, *_ = RandomCrop.get_params(torch.empty(1, 1, 1).expand(1, height, width), (size, size))
    return top, left


def _central_place(height: int, width: int, size: int) -> tuple[int, int]:
    """Where torchvision's `CenterCrop` of this size begins."""
    return round((height - size) / 2), round((width - size) / 2)


def build_transforms(final_reso: int, hflip: bool = False, mid_reso: float = 1.125,
                     crop: str = 'resize') -> tuple[Compose, Compose]:
    """(training, validation) transforms from PIL image to pixels (3, final_reso, final_reso) in [-1, 1].

    Args:
        final_reso: side of the square crops in pixels.
        hflip: whether training flips half of the images, before anything else.
        mid_reso: see `crop`.
        crop: 'resize' (VAR): the shorter side is resized to round(mid_reso * final_reso) by Lanczos; training
            takes a random crop, validation the centre. 'adm' (LlamaGen, with mid_reso 1.25): the shorter side
            is random in [1, mid_reso] * final_reso, and the crop, too. 'vae' (MAR): as 'resize' for training.
            The last two validate on the centre crop of ADM.
    Raises:
        ValueError: the crop is none of these.
    """
    side = round(mid_reso * final_reso)
    random_crop = ResizedCrop(side, final_reso, partial(_random_place, size=final_reso))
    center_crop = ResizedCrop(side, final_reso, partial(_central_place, size=final_reso))
    adm_random = AdmRandomCrop(final_reso, 1 / mid_reso)
    adm_center = partial(adm_center_crop, size=final_reso)
    crops = {
        'resize': (random_crop, center_crop),
        'adm': (adm_random, adm_center),
        'vae': (random_crop, adm_center),
    }
    if crop not in crops:
        raise ValueError(f'--crop must be one of {", ".join(crops)}, got {crop!r}')
    train, val = crops[crop]
    to_pixels = [ToTensor(), normalize_01_into_pm1]
    flip = [RandomHorizontalFlip()] if hflip else []
    return Compose([*flip, train, *to_pixels]), Compose([val, *to_pixels])


def ten_crop_views(image: Image.Image, size: int, crop_range: float) -> torch.Tensor:
    """Ten views (10, 3, size, size) of an image in [-1, 1], those of its mirror image last.

    Args:
        size: side of a view in pixels.
        crop_range: the views are the corners and the centre of a centre crop that is this many times larger,
            in the order top left, top right, bottom left, bottom right, centre.
    """
    larger = adm_center_crop(image, int(size * crop_range))
    return torch.stack([normalize_01_into_pm1(to_tensor(view)) for view in ten_crop(larger, [size])])


def open_split(data_path: str, split: str, transform: Callable | None = None, exif: bool = True,
               val_split: float = 0.) -> Dataset:
    """One split, 'train' or 'val', of a data set; its items are (image, class id).

    Args:
        data_path: root with `train/<class>/<image>` and `val/<class>/<image>`, or 'digits' or 'toy'; or with
            `train.txt` and `val.txt`, lists of the images in `train/` and `val/`, see `ListedImages`; or a
            folder of `utils.pack_data`. Images without class folders are of one class.
        transform: PIL image -> tensor.
        exif: turn images as their EXIF orientation says.
        val_split: of data without val/, hold out this share of each class for validation, see `held_out`; the
            root itself may then hold the class folders, or the images. 0 expects val/.
    Raises:
        ValueError: the folder is missing or empty, or a class has no image; or there is a val/ already.
    """
    if val_split:
        return part_of(_open_whole(data_path, val_split, transform, exif), split, val_split)
    if data_path in EMBEDDED:
        return EMBEDDED[data_path](split == 'train', transform)
    root = Path(data_path)
    if is_packed(root):
        return PackedImages(root, split, transform, exif)
    folder = root / split
    if not folder.is_dir():
        raise ValueError(_advice_on_missing_split(root, split))
    return _open_folder(folder, folder.with_suffix('.txt'), transform, exif)


def _open_folder(folder: Path, listing: Path, transform: Callable | None,
                 exif: bool) -> 'ClassFolders | ListedImages':
    """The images that a list names in a folder, or all of them where there is no list."""
    loader = partial(pil_loader, upright=exif)
    if listing.is_file():
        return ListedImages(listing, folder, transform, loader)
    return ClassFolders(str(folder), loader=loader, extensions=IMG_EXTENSIONS, transform=transform)


def _open_whole(data_path: str, val_split: float, transform: Callable | None,
                exif: bool) -> 'ClassFolders | ListedImages':
    """All images of a data set that has no validation images of its own.

    They are in `train/`, or else in the root itself.

    Raises:
        ValueError: there is a validation set, or the root holds something else than classes or images.
    """
    root = Path(data_path)
    flag = f'--val_split={val_split:g}'
    if data_path in EMBEDDED or is_packed(root):
        raise ValueError(f'{flag} is for a folder without val/, {data_path!r} has its own validation '
                         'images: leave out the flag')
    for place in (root / 'val', root / 'val.txt'):
        if place.exists():
            raise ValueError(f'{flag} is for data without val/, but {str(place)!r} is there: leave out the '
                             'flag, or move that away')
    if (root / 'train').is_dir():
        return _open_folder(root / 'train', root / 'train.txt', transform, exif)
    if not root.is_dir():
        raise ValueError(f'expected images in {str(root)!r}, found no such folder: correct --data_path')

    # Folders with the names of splits would become classes.
    folders = _folders(root)
    names = {*OTHER_SPLITS, *SPLIT_NAMES['train'], *SPLIT_NAMES['val']}
    odd = [name for name in folders if name.lower() in names]
    if odd:
        raise ValueError(f'{flag} takes the folders in {str(root)!r} for classes, but {odd[0]!r} looks like '
                         'a part of the data: call the folder of all training images train, or move that '
                         'away')
    if len(folders) == 1 and 'train' in _folders(root / folders[0]):
        raise ValueError(f'{flag} takes the folders in {str(root)!r} for classes, but '
                         f'{str(root / folders[0])!r} holds train/: pass that as --data_path')
    return _open_folder(root, root / 'train.txt', transform, exif)


def part_of(images: 'ClassFolders | ListedImages', split: str, share: float) -> 'ClassFolders | ListedImages':
    """The same data set with the images of one split alone.

    Args:
        images: all images.
        split: 'val' takes those that are held out, 'train' the others.
        share: see `held_out`.
    Raises:
        ValueError: no image is held out.
    """
    held_out_N = held_out(images.names(), images.targets, share)
    if not held_out_N.any():
        raise ValueError(f'--val_split={share:g} holds out no image: every class in {images.root!r} has a '
                         'single image, which stays in training; add images, or val/')
    chosen_N = held_out_N if split == 'val' else ~held_out_N
    part = copy.copy(images)
    part.select(np.flatnonzero(chosen_N).tolist())
    return part


def held_out(names: Sequence[str], targets: Sequence[int], share: float) -> np.ndarray:
    """(N,) bool, whether each image is held out for validation.

    Of every class with two images or more, this share is held out, but one image at least, and not all of
    them. Which ones follows from their names alone, through SHA-256, so that an image seldom changes sides
    when others are added.

    Args:
        names: of all images.
        targets: their class ids.
        share: in (0, 1).
    """
    by_class = defaultdict(list)
    for index, label in enumerate(targets):
        by_class[int(label)].append(index)
    held_out_N = np.zeros(len(names), bool)
    for members in by_class.values():
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        members.sort(key=lambda index: hashlib.sha256(os.fsencode(names[index])).digest())
        held_out_N[members[:count]] = True
    return held_out_N


def _advice_on_missing_split(root: Path, split: str) -> str:
    """The error for a missing folder `split`, with what to do about the folders and images that are there."""
    missing = f'expected class folders in {str(root / split)!r}, found no such folder'
    folders = _folders(root)
    for name in folders:
        if name not in SPLIT_NAMES and name.lower() in SPLIT_NAMES[split]:
            return f'{missing}, but {str(root / name)!r} is there: rename that folder to {split!r}'
        if {'train', 'val'} <= set(_folders(root / name)):
            return f'{missing}, but {str(root / name)!r} holds train/ and val/: pass that as --data_path'
    other = 'val' if split == 'train' else 'train'
    if other in folders and split == 'val':
        return (f'{missing}, but {str(root / other)!r} is there: pass --val_split=0.1 to hold out a tenth of '
                'each class, or move a part of the images of each class, a tenth say, from train/<class>/ to '
                'val/<class>/, with the same names of classes')
    if other in folders:
        return (f'{missing}, but {str(root / other)!r} is there: move most images of each class, nine tenths '
                'say, from val/<class>/ to train/<class>/, with the same names of classes')
    in_classes = [name for name in folders if name != 'test' and _count_images(root / name)]
    if in_classes:
        return (f'{missing}; {str(root)!r} holds {len(in_classes)} folders of images itself (the first is '
                f'{in_classes[0]!r}): pass --val_split=0.1 to hold out a tenth of each, or move them into '
                'train/, and a part of the images of each, a tenth say, into val/<class>/')
    count = _count_images(root)
    if count:
        return (f'{missing}; {str(root)!r} holds {count} images without folders: pass --val_split=0.1 to '
                'train on nine tenths of them as one class, or put them into train/<class>/, one folder per '
                'class, and a part of them, a tenth say, into val/<class>/')
    return f'{missing}: pass --data_path=ROOT with ROOT/train and ROOT/val, --data_path=digits or toy'


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder that are data, sorted."""
    if not folder.is_dir():
        return []
    entries = [entry for entry in os.scandir(folder) if is_data(entry.name)]
    return sorted(entry.name for entry in entries if is_folder(entry))


def _count_images(folder: Path) -> int:
    """Number of images that lie directly in a folder."""
    if not folder.is_dir():
        return 0
    names = [entry.name for entry in os.scandir(folder) if is_data(entry.name) and not is_folder(entry)]
    return len([name for name in names if name.lower().endswith(IMG_EXTENSIONS)])


def build_dataset(data_path: str, final_reso: int, hflip: bool = False, mid_reso: float = 1.125,
                  crop: str = 'resize', exif: bool = True, val_split: float = 0.,
                  val_path: str = '') -> tuple[int, Dataset, Dataset]:
    """(number of classes, training set, validation set).

    Args:
        data_path: see `open_split`. Classes are the folder names in sorted order and must be the same in
            both splits.
        final_reso: see `build_transforms`.
        hflip: see `build_transforms`.
        mid_reso: see `build_transforms`.
        crop: see `build_transforms`.
        exif: see `open_split`.
        val_split: see `open_split`.
        val_path: see `open_both`.
    Raises:
        ValueError: a folder is missing or empty, or the classes differ.
    """
    train_aug, val_aug = build_transforms(final_reso, hflip, mid_reso, crop)
    train_set, val_set = open_both(data_path, train_aug, val_aug, exif, val_split, val_path)
    return len(train_set.classes), train_set, val_set


def open_both(data_path: str, train_transform: Callable | None = None, val_transform: Callable | None = None,
              exif: bool = True, val_split: float = 0., val_path: str = '') -> tuple[Dataset, Dataset]:
    """Training and validation set, with the same classes; see `open_split`.

    Args:
        data_path: see `open_split`; or an npz of images for training alone, see `DrawnImages`.
        val_path: with an npz, the data set of the validation images, which names its classes.
    Raises:
        ValueError: a folder is missing or empty, or the classes differ.
    """
    if is_npz(data_path):
        val_set = open_split(val_path, 'val', val_transform, exif, val_split)
        return DrawnImages(data_path, val_set.classes, train_transform), val_set
    if val_split:
        whole = _open_whole(data_path, val_split, train_transform, exif)
        train_set = part_of(whole, 'train', val_split)
        val_set = part_of(whole, 'val', val_split)
        val_set.transform = val_transform
        return train_set, val_set
    train_set = open_split(data_path, 'train', train_transform, exif)
    val_set = open_split(data_path, 'val', val_transform, exif)
    if isinstance(train_set, ListedImages) != isinstance(val_set, ListedImages):
        raise ValueError(f'expected both train.txt and val.txt in {data_path!r}, or neither, found one: '
                         'list the images of both, or rename the list to use class folders')
    for images, others in ((train_set, val_set), (val_set, train_set)):
        if getattr(images, 'is_flat', False) and not getattr(others, 'is_flat', False):
            name = Path(images.root).name
            raise ValueError(f'{images.root!r} holds {len(images)} images but no class folder: sort the '
                             f'images of {name}/ into class folders as in {Path(others.root).name}/, or list '
                             'them in val.txt beside val/, and those of train/ in train.txt, one "path '
                             'class" per line')
    if train_set.classes != val_set.classes:
        odd = sorted(set(train_set.classes) ^ set(val_set.classes))

        # An umlaut can be one character or two; a copy between systems may change one into the other.
        forms = [unicodedata.normalize('NFC', name) for name in odd]
        if len(set(forms)) < len(forms):
            raise ValueError(f'train/ and val/ of {data_path!r} must hold the same classes; names look the '
                             f'same but are spelt with other characters, such as '
                             f'{", ".join(map(ascii, odd[:4]))}: '
                             'rename the folders so that both are composed or both decomposed')
        raise ValueError(f'train/ and val/ of {data_path!r} must hold the same classes, '
                         f'they differ in {odd[:5]} ({len(odd)} in all): add or remove these')
    return train_set, val_set


# ---------------------------------------------------------------------------------------------- what is data
class ClassFolders(DatasetFolder):
    """One folder of images per class, in the order of torchvision's `DatasetFolder`.

    Images without class folders are of one class. Names that `is_data` refuses are left out silently. Files
    whose suffix is not that of an image are counted in one line of the log.

    Attributes:
        is_flat: whether there are no class folders.
        left_out: paths of the files that are left out because of their suffix.
    Raises:
        ValueError: there are neither class folders nor images, or a class folder has no images.
    """

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Names of the class folders, sorted, and their ids; or an error that says what to do."""
        folder = Path(directory)
        classes = _folders(folder)
        self.is_flat = not classes
        if self.is_flat:
            count = _count_images(folder)
            if not count:
                raise ValueError(f'{directory!r} holds no class folder and no images: put images into '
                                 f'{folder.name}/<class>/, one folder per class, a part of them, a tenth '
                                 'say, into val/<class>/ and the others into train/<class>/, or all into '
                                 'train/<class>/ and pass --val_split=0.1')
            if dist.is_master():
                logger.info('%r has no class folders: its %d images are of one class', directory, count)
            classes = [ONE_CLASS]
        return classes, {name: i for i, name in enumerate(classes)}

    def make_dataset(self, directory: str, class_to_idx: dict[str, int], extensions: tuple[str, ...],
                     **_: Any) -> list[tuple[str, int]]:
        """(path, class id) of every image, sorted by class, folder and name."""
        samples: list[tuple[str, int]] = []
        left_out: Counter[str] = Counter()
        self.left_out: list[str] = []
        empty = []
        for name, label in sorted(class_to_idx.items()):
            num_before = len(samples)
            class_folder = directory if self.is_flat else os.path.join(directory, name)
            for folder, files in sorted(files_below(class_folder)):
                for file in sorted(files):
                    if file.lower().endswith(extensions):
                        samples.append((os.path.join(folder, file), label))
                    else:
                        self.left_out.append(os.path.join(folder, file))
                        suffix = os.path.splitext(file)[1].lower()
                        if not suffix.isprintable():
                            suffix = repr(suffix)
                        left_out[suffix or 'without suffix'] += 1
            if len(samples) == num_before:
                empty.append(name)
        listing = ', '.join(f'{count} {suffix}' for suffix, count in left_out.most_common(8))
        if empty:
            others = f'; other files there: {listing}' if listing else ''
            raise ValueError(f'expected images in every class folder of {directory!r}: no valid file for '
                             f'{", ".join(map(repr, empty[:5]))} ({len(empty)} in all{others}), images end '
                             f'with {", ".join(extensions)}; add images to it or remove the folder')
        if left_out and dist.is_master():
            logger.warning('left out %d files of %r that do not end as images do: %s', left_out.total(),
                           directory, listing)
        return samples

    def select(self, indices: list[int]) -> None:
        """Keep these images alone."""
        self.samples = self.imgs = [self.samples[index] for index in indices]
        self.targets = [label for _, label in self.samples]

    def names(self) -> list[str]:
        """Paths of all images, relative to the folder."""
        return [path.removeprefix(f'{self.root}{os.sep}') for path, _ in self.samples]

    def path_of(self, index: int) -> str:
        """Path of an image."""
        return self.samples[index][0]


class ListedImages(Dataset):
    """Images named in a text file, one `path class` per line: how the published FlexVAR reads ImageNet.

    Args:
        listing: the text file; classes are integers from 0 on, none of them without an image.
        folder: the paths are relative to it.
        transform: PIL image -> tensor.
        loader: path -> PIL image.
    Raises:
        ValueError: a line is not of this form, there are no lines, or a class has no image.
    """

    def __init__(self, listing: Path, folder: Path, transform: Callable | None = None,
                 loader: Callable = pil_loader):
        self.transform = transform
        self.loader = loader
        self.root = str(folder)
        self.paths: list[str] = []
        self.targets: list[int] = []
        text = listing.read_text(encoding='utf-8-sig', errors='surrogateescape')  # without a byte order mark
        for number, line in enumerate(text.split('\n'), start=1):
            parts = line.strip().rsplit(maxsplit=1)
            if not parts:
                continue
            if len(parts) < 2 or not (parts[1].isascii() and parts[1].isdecimal()):
                raise ValueError(f'expected "path class" in line {number} of {str(listing)!r}, got '
                                 f'{line[:200]!r}: correct it, or use class folders without the list')
            self.paths.append(str(folder / parts[0]))
            self.targets.append(int(parts[1]))
        if not self.paths:
            raise ValueError(f'expected images in {str(listing)!r}, got an empty list: use class folders '
                             'without it')
        check_labels(self.targets, str(listing))
        self.classes = [str(label) for label in range(max(self.targets) + 1)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple:
        image = self.loader(self.paths[index])
        return self.transform(image) if self.transform else image, self.targets[index]

    def select(self, indices: list[int]) -> None:
        """Keep these images alone."""
        self.paths = [self.paths[index] for index in indices]
        self.targets = [self.targets[index] for index in indices]

    def names(self) -> list[str]:
        """Paths of all images, relative to the folder."""
        return [path.removeprefix(f'{self.root}{os.sep}') for path in self.paths]

    def path_of(self, index: int) -> str:
        """Path of an image."""
        return self.paths[index]


def check_labels(targets: Sequence[int], source: str) -> None:
    """Make sure that every class has an image, since a generator cannot learn a class without images.

    Args:
        targets: class id of every image.
        source: the file or folder that they come from, for the message.
    Raises:
        ValueError: a class has no image.
    """
    seen = set(map(int, targets))
    num_classes = max(seen) + 1
    # A wrong number may mean a billion classes, so no list of all classes is made.
    if len(seen) < num_classes:
        first = next(label for label in range(num_classes) if label not in seen)
        begins = 'classes begin at 0, and ' if first == 0 else ''
        raise ValueError(f'{source!r} has no image of class {first} ({num_classes - len(seen)} of '
                         f'{num_classes} classes are without): {begins}classes are numbered without gaps; '
                         'correct the numbers')


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says about its data: the number of images, a digest of their names and classes.

    Returns:
        count; digest, of names and classes in order, 16 hexadecimal digits.
    """
    targets = getattr(dataset, 'targets', ())
    if hasattr(dataset, 'names'):
        lines = [f'{name}\t{label}' for name, label in zip(dataset.names(), targets, strict=True)]
        text = os.fsencode('\n'.join(lines))
    else:
        # Embedded images have no names; the manifest of a token cache has a digest of those of its images.
        manifests = getattr(dataset, 'manifests', [{}])
        text = f'{type(dataset).__name__} {manifests[0].get("images")} '.encode()
        text += np.asarray(targets, dtype=np.int64).tobytes()
    return dict(count=len(dataset), digest=hashlib.sha256(text).hexdigest()[:16])


def name_of(dataset: Dataset, index: int) -> str:
    """The file of an image, or its number in a data set without files."""
    if isinstance(dataset, Subset):
        return name_of(dataset.dataset, dataset.indices[index])
    if hasattr(dataset, 'path_of'):
        return dataset.path_of(index)
    return f'{type(dataset).__name__}[{index}]'


@contextmanager
def keyed_random(*keys: int) -> Iterator[None]:
    """Inside, random transforms depend on the keys alone; the caller's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which also seeds every GPU: transforms run on the CPU.
        torch.default_generator.manual_seed(mix_seed(*keys))
        yield


class KeyedAugmentation(Dataset):
    """Items by (epoch, index), whose random transforms depend on (seed, epoch, index) alone.

    So augmentation is the same for any number of workers and ranks, and after any restart. An index beyond
    the last image counts on from the first one: the same images, with other random numbers.

    Args:
        dataset: its items are (image, label).
        seed: of the training.
        replace_damaged: whether another image stands in for an image that cannot be read. Which one it is
            also follows from (seed, epoch, index) alone. Items are then (image, label, damage), where
            `damage` says why the image could not be read, or is ''.
    Raises:
        ImageError: neither the image nor any of those tried in its place can be read.
    """

    def __init__(self, dataset: Dataset, seed: int, replace_damaged: bool = False):
        self.dataset = dataset
        self.seed = seed
        self.replace_damaged = replace_damaged

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        image_index = index % len(self.dataset)
        if not self.replace_damaged:
            return self._item(image_index, epoch, index)
        damage = ''
        for attempt in range(MAX_REPLACEMENTS):
            chosen = image_index
            if attempt > 0:
                chosen = mix_seed(self.seed, epoch, index, attempt) % len(self.dataset)
            try:
                image, label = self._item(chosen, epoch, index)
                return image, label, damage
            except ImageError as error:
                damage = damage or str(error)
        raise ImageError(f'{damage}; {MAX_REPLACEMENTS - 1} others in its place cannot be read either')

    def _item(self, chosen: int, epoch: int, index: int) -> tuple:
        """Item `chosen`, transformed by the random numbers of item `index` of an epoch."""
        with keyed_random(self.seed, epoch, index):
            return self.dataset[chosen]


class MirroredCrops(Dataset):
    """(views (2 N, 3, H, W) in [-1, 1], class id) of every image: N crops of it, then their mirror images.

    Crop v of an image is what a training with the same seed and without `--hflip` sees of it in epoch v.

    Args:
        images: their items are (PIL image, class id).
        crop: PIL image -> pixels (3, H, W) of a crop, see `build_transforms`.
        count: N.
        seed: of the crops where they are random.
    """

    def __init__(self, images: Dataset, crop: Callable, count: int = 1, seed: int = 0):
        self.images = images
        self.crop = crop
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple:
        image, label = self.images[index]
        crops = []
        for view in range(self.count):
            with keyed_random(self.seed, view, index):
                crops.append(self.crop(image))
        crops_N3HW = torch.stack(crops)
        return torch.cat([crops_N3HW, crops_N3HW.flip(-1)]), label
