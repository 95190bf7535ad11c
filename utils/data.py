"""Image folders and the embedded digits behind one interface; augmentation is keyed by (seed, epoch, image).

Pixels are float32 in [-1, 1], (3, H, W).
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
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

from utils.misc import mix_seed

HELD_OUT_EVERY = 5  # every fifth digit is held out for validation
DIGIT_SIZE = 32


def normalize_01_into_pm1(x: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> [-1, 1]; the argument is left as it is."""
    return x.add(x).add_(-1)


def pil_loader(path: str) -> Image.Image:
    """The RGB image of a file.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    try:
        with Path(path).open('rb') as file:
            image = Image.open(file)
            if image.mode.startswith('I'):  # 16-bit grey, which `convert` would clip
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
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
        image = image.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC).convert('RGB')
        return self.transform(image) if self.transform else image, int(self.targets[index])


def build_transforms(final_reso: int, hflip: bool = False,
                     mid_reso: float = 1.125) -> tuple[Compose, Compose]:
    """(train, validation) transforms from PIL image to [-1, 1].

    A flip, the shorter side to round(mid_reso * final_reso) by Lanczos, then a random or centre crop.
    """
    resize = Resize(round(mid_reso * final_reso), interpolation=InterpolationMode.LANCZOS)
    finish = [ToTensor(), normalize_01_into_pm1]
    train = [RandomHorizontalFlip()] * hflip + [resize, RandomCrop((final_reso, final_reso)), *finish]
    return Compose(train), Compose([resize, CenterCrop((final_reso, final_reso)), *finish])


def build_dataset(data_path: str, final_reso: int, hflip: bool = False,
                  mid_reso: float = 1.125) -> tuple[int, Dataset, Dataset]:
    """(number of classes, training set, validation set).

    Args:
        data_path: root with `train/<class>/<image>` and `val/<class>/<image>`, or 'digits'. Classes are the
            folder names in sorted order and must be the same in both.
        final_reso: side of the square crops in pixels.
    Raises:
        ValueError: a folder is missing or empty, or the classes differ.
    """
    train_aug, val_aug = build_transforms(final_reso, hflip, mid_reso)
    if data_path == 'digits':
        return 10, Digits(True, train_aug), Digits(False, val_aug)
    sets = []
    for split, transform in (('train', train_aug), ('val', val_aug)):
        folder = Path(data_path) / split
        if not folder.is_dir():
            raise ValueError(f'expected class folders in {folder}, found no such folder: '
                             'pass --data_path=ROOT with ROOT/train and ROOT/val, or --data_path=digits')
        try:
            sets.append(ClassFolders(str(folder), loader=pil_loader, extensions=IMG_EXTENSIONS,
                                      transform=transform))
        except FileNotFoundError as error:
            raise ValueError(f'expected images in every class folder of {folder}: {error}; '
                             'add images to it or remove the folder') from None
    train_set, val_set = sets
    if train_set.classes != val_set.classes:
        odd = sorted(set(train_set.classes) ^ set(val_set.classes))
        raise ValueError(f'train/ and val/ of {data_path} must hold the same classes, '
                         f'they differ in {odd[:5]} ({len(odd)} in all): add or remove these folders')
    return len(train_set.classes), train_set, val_set


class ClassFolders(DatasetFolder):
    """One folder of images per class; hidden folders, which notebooks leave behind, are no classes."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted(path.name for path in Path(directory).iterdir()
                         if path.is_dir() and not path.name.startswith('.'))
        if not classes:
            raise FileNotFoundError(f'{directory} holds no class folder')
        return classes, {name: i for i, name in enumerate(classes)}


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
            torch.manual_seed(mix_seed(self.seed, epoch, index))
            return self.dataset[index]
