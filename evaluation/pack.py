"""Files for `evaluate.py REF SAMPLE`: statistics of images (`stats`), and images as one npz (`pack`)."""
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dist
from configs.options import INF, check_values, expand_paths, opt
from configs.training import VAL_SPLIT_HELP, VAL_SPLIT_LIMITS
from evaluation.features import FeatureSettings, extract, load_network
from evaluation.metrics import to_uint8
from evaluation.score import check_output, refuse_overwriting
from utils.checkpoint import atomic_path
from utils.data import build_transforms, open_split
from utils.image_sets import NUM_READERS, open_images, pack_folder, shuffled, write_npz
from utils.image_store import map_ahead

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StatsSettings(FeatureSettings):
    """Settings of `evaluate.py stats`."""

    images: str = opt('', 'npz or folder of PNG files', positional=True, path=True)
    output: str = opt('', 'npz to write', positional=True, path=True)
    keep_images: bool = opt(False, 'store the images, too, as precision and recall need')

    def __post_init__(self):
        super().__post_init__()
        if not (self.images and self.output):
            raise ValueError('expected INPUT and OUTPUT: evaluate.py stats FOLDER_OR_NPZ OUT.npz')
        refuse_overwriting(self.output, self.images)


def evaluate_stats(settings: StatsSettings) -> None:
    """`evaluate.py stats`: write mu, sigma and, where the network has spatial features, mu_s, sigma_s.

    Raises:
        MissingWeights: the feature network has no weights.
        ValueError: the images cannot be read or are too few, or the output cannot be written.
    """
    images = open_images(settings.images)
    if images.count < 2:
        raise ValueError(f'statistics need 2 images or more, {settings.images} holds {images.count}: '
                         'add some')
    check_output(settings.output)
    network = load_network(settings)
    features, inspection = extract(images, network, settings)
    if dist.is_master():
        content = features.arrays()
        if settings.keep_images:
            write_npz(settings.output, images.blocks(), images.count, images.height, images.width, **content)
        else:
            with atomic_path(settings.output) as temporary, temporary.open('wb') as file:
                np.savez(file, **content)
        for note in images.warnings + inspection.warnings(images.path.name):
            logger.warning(note)
        logger.info('statistics of %d images are in %s', images.count, settings.output)
    dist.barrier()


@dataclass(frozen=True)
class PackSettings:
    """Settings of `evaluate.py pack`."""

    folder: str = opt('', 'PNG files and, where known, labels.npy; or, with --image_size, a data set',
                      positional=True, path=True)
    output: str = opt('', 'npz to write', positional=True, path=True)
    count: int | None = opt(None, 'number of images that the folder must hold; None takes what is there',
                            limits=(1, INF))
    seed: int = opt(0, 'of the order', limits=(0, 2 ** 63 - 1))
    no_shuffle: bool = opt(False, 'keep the order of names; the Inception Score needs a mixed one')
    allow_jpeg: bool = opt(False, 'accept JPEG files, whose losses change FID')
    image_size: int | None = opt(None, 'FOLDER is a data set of train.py, its images are cropped to squares '
                                       'of this side as the references of ADM', limits=(1, INF))
    split: str = opt('val', 'of the data set: val or train', choices=('val', 'train'))
    val_split: float = opt(0.0, 'of the data set, as for train.py: ' + VAL_SPLIT_HELP,
                           limits=VAL_SPLIT_LIMITS)
    exif: bool = opt(True, 'turn the images of a data set as their EXIF orientation says, as in training')

    def __post_init__(self):
        expand_paths(self)
        if not (self.folder and self.output):
            raise ValueError('expected FOLDER and OUTPUT: evaluate.py pack FOLDER OUT.npz')
        check_values(self)
        if self.seed >= 2 ** 32:
            raise ValueError(f'--seed must be below 2**32, got {self.seed}')
        # FOLDER.npz is where the images of FOLDER belong; anything else must not be in the way.
        if Path(self.output).resolve() != Path(f'{self.folder}.npz').resolve():
            refuse_overwriting(self.output, self.folder)


def evaluate_pack(settings: PackSettings) -> None:
    """`evaluate.py pack`: write a folder of images, or a data set, as one npz in random order.

    Raises:
        ValueError: an image cannot be read, or there is another number of images than expected.
    """
    if dist.is_master():
        check_output(settings.output)
        seed = None if settings.no_shuffle else settings.seed
        if settings.image_size:
            pack_data_set(settings, seed)
        else:
            images = pack_folder(settings.folder, settings.output, settings.count, seed, settings.allow_jpeg)
            for note in images.warnings:
                logger.warning(note)
        logger.info('packed the images of %s into %s', settings.folder, settings.output)
    dist.barrier()


def pack_data_set(settings: PackSettings, seed: int | None) -> None:
    """Write the centre crops of a split of a data set, and their classes, to be used as a reference.

    Args:
        seed: of the order, see `shuffled`; None keeps the order of the data set.
    Raises:
        ValueError: an image cannot be read, or there is another number of images than expected.
    """
    size = settings.image_size
    count = settings.count
    _, transform = build_transforms(size, crop='adm')
    images = open_split(settings.folder, settings.split, transform, settings.exif, settings.val_split)
    if count not in (None, len(images)):
        raise ValueError(f'expected {count} images in {settings.folder}, got {len(images)}: correct --count')
    order = np.arange(len(images)) if seed is None else shuffled(len(images), seed)

    def crop(i: int) -> np.ndarray:
        image_3HW, _ = images[i]
        return to_uint8(image_3HW).permute(1, 2, 0).numpy()

    crops = map_ahead(crop, order.tolist(), NUM_READERS)
    labels_N = np.asarray(images.targets)[order]
    write_npz(settings.output, crops, len(order), size, size, labels_N)
