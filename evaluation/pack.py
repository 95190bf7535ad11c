"""Files for `evaluate.py REF SAMPLE`: statistics of images (`stats`), and images as one npz (`pack`)."""
import logging
from typing import Any

import numpy as np

import dist
from evaluation.beyond_fid import dtype_of
from evaluation.features import extract, load_network
from evaluation.metrics import to_uint8
from evaluation.score import check_output
from evaluation.settings import PackSettings, StatsSettings
from utils.checkpoint import atomic_path
from utils.data import build_transforms, open_split
from utils.image_sets import NUM_READERS, ImageSet, open_images, pack_folder, shuffled, write_npz
from utils.image_store import map_ahead

logger = logging.getLogger(__name__)


def evaluate_stats(settings: StatsSettings) -> None:
    """`evaluate.py stats`: write mu, sigma and, where the network has spatial features, mu_s, sigma_s.

    With --encoder the file also says which encoder, precision and images it is of.

    Raises:
        MissingWeights: the feature network has no weights.
        ValueError: the images cannot be read or are too few, or the output cannot be written.
    """
    images = open_images(settings.images)
    if images.count < 2:
        raise ValueError(f'statistics need 2 images or more, {settings.images} holds {images.count}: '
                         'add some')
    check_output(settings.output)
    network = load_network(settings, settings.encoder) if settings.encoder else load_network(settings)
    features, inspection = extract(images, network, settings)
    if dist.is_master():
        content = features.arrays()
        if settings.encoder:
            content |= description_of(images, network, settings.encoder)
        if settings.keep_images:
            write_npz(settings.output, images.blocks(), images.count, images.height, images.width, **content)
        else:
            with atomic_path(settings.output) as temporary, temporary.open('wb') as file:
                np.savez(file, **content)
        for note in images.warnings + inspection.warnings(images.path.name):
            logger.warning(note)
        logger.info('statistics of %d images are in %s', images.count, settings.output)
    dist.barrier()


def description_of(images: ImageSet, network: Any, encoder: str) -> dict[str, np.ndarray]:
    """What a file of statistics says about itself, so that it is compared with nothing else."""
    return dict(
        count=np.array(images.count),
        image_size=np.array(images.width),
        encoder=np.array(encoder),
        dtype=np.array(dtype_of(network)),
        weights_sha256=np.array(network.digest),
    )


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
