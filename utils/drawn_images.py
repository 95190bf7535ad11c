"""Images that a generator has drawn, as a training set: an npz of sample.py, read where it lies."""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from utils.files import read_json
from utils.image_sets import NpzImages


def is_npz(path: str | Path) -> bool:
    """Whether a path names an npz, which is then no folder of images."""
    return str(path).endswith('.npz')


class DrawnImages(Dataset):
    """`arr_0` of an npz, uint8 (N, H, W, 3), with the labels in `arr_1`.

    Args:
        path: the npz; the manifest of sample.py lies beside it, if it is there.
        classes: names of the classes by label: those of the data that the generator was trained on.
        transform: PIL image -> tensor.
    Attributes:
        manifest: its content; {} where there is none.
    Raises:
        ValueError: the file holds no labelled images that can be read in any order, or its labels mean other
            classes than these.
    """

    def __init__(self, path: str | Path, classes: Sequence[str], transform: Callable | None = None):
        self.images = NpzImages(path)
        self.classes = list(classes)
        self.transform = transform
        self.manifest = manifest_beside(path)
        if not self.images.is_stored:
            raise ValueError(f'expected images that can be read in any order, got compressed ones in {path}: '
                             'store them by np.savez')
        if self.images.labels is None:
            found = self.images.describe_array('arr_1')
            raise ValueError(f'expected a class id for each image as arr_1 of {path}, {self.images.count} '
                             f'integers, got {found}: store them by np.savez(file, '
                             'images, labels), as sample.py does')
        self.targets = self.images.labels
        self.check_classes()
        # The digest of the file that `describe_data` looks for; hashing a large file takes minutes.
        self.manifests = [dict(images=self.manifest.get('npz_sha256'))]

    def check_classes(self) -> None:
        """Make sure that a label means the same class for the generator and here.

        Raises:
            ValueError: it does not, or is no class.
        """
        last = len(self.classes) - 1
        if self.targets.min() < 0 or self.targets.max() > last:
            raise ValueError(f'{self.images.path} has labels {self.targets.min()}..{self.targets.max()}, the '
                             f'validation images have classes 0..{last}: pass the data set that the '
                             'generator was trained on as --val_path')
        for label, name in self.manifest.get('classes', {}).items():
            here = repr(self.classes[int(label)]) if int(label) <= last else 'missing'
            if repr(name) != here:
                raise ValueError(f'class {label} of {self.images.path} is {name!r}, that of the validation '
                                 f'images is {here}: pass the data set that the generator was trained on '
                                 'as --val_path')

    def __len__(self) -> int:
        return self.images.count

    def __getitem__(self, index: int) -> tuple:
        image = Image.fromarray(self.images[index])
        return self.transform(image) if self.transform else image, int(self.targets[index])


def manifest_beside(path: str | Path) -> dict[str, Any]:
    """The manifest that sample.py has written beside an npz; {} where there is none.

    Raises:
        ValueError: the file of that name cannot be read, or its settings or classes are damaged.
    """
    manifest_path = Path(path).with_suffix('.json')
    try:
        manifest = read_json(manifest_path)
        if not isinstance(manifest.get('npz_sha256'), str):
            return {}  # a JSON file of another program, which happens to have this name
        for name in ('settings', 'classes'):
            if not isinstance(manifest.get(name, {}), dict):
                raise ValueError(f'its {name} are no object')
        odd = [label for label in manifest.get('classes', {}) if not label.isdecimal()]
        if odd:
            raise ValueError(f'it names a class {odd[0]!r}, which is no number')
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f'expected the manifest of sample.py at {str(manifest_path)!r}, cannot read it '
                         f'({error}): restore or remove it') from None
    return manifest
