"""Decoded images in memory that all processes of a machine share: `--cache=memory`.

A small set is decoded once, before the loader processes begin, and read from memory by all of them in every
epoch. The pixels are those of the files, so a training with this cache equals one without.
Letters: N images.
"""
import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

import dist
from utils.image_store import map_ahead
from utils.images import ImageError
from utils.log import progress_bar
from utils.machine import available_cpus, free_memory, process_space
from utils.shards import FilesAtOffsets

logger = logging.getLogger(__name__)
MIB = 2 ** 20
SHARE = 0.5        # of the free memory that a cache may take
NUM_EXAMPLES = 64  # images whose mean size tells beforehand how large the cache will be


@dataclass
class Places:
    """Where the pixels of a data set are in memory.

    Attributes:
        begins_N: the first byte of an image.
        sides_N2: height and width; 0 and 0 of an image that cannot be read.
    """
    begins_N: np.ndarray
    sides_N2: np.ndarray


class CachedImages(Dataset):
    """The same items as those of a data set of images, from memory.

    Args:
        images: items are (image, class id).
        memory: holds the pixels, as a file.
        places: of the images in it.
    """

    def __init__(self, images: Dataset, memory: FilesAtOffsets, places: Places):
        self.images = images
        self.memory = memory
        self.places = places
        self.classes = images.classes
        self.targets = images.targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple:
        height, width = self.places.sides_N2[index].tolist()
        if height == 0:
            return self.images[index]  # raises the error that names the file
        content = self.memory.read(0, int(self.places.begins_N[index]), height * width * 3)
        image = Image.frombytes('RGB', (width, height), content)
        transform = self.images.transform
        return transform(image) if transform else image, int(self.targets[index])

    def names(self) -> list[str]:
        """Names of all images, as the data set has them."""
        return self.images.names()

    def path_of(self, index: int) -> str:
        """Path of an image, as the data set has it."""
        return self.images.path_of(index)


def cached_in_memory(*sets: Dataset) -> list[CachedImages]:
    """Data sets that are read from memory, of which the ranks of a machine share one copy; all ranks call it.

    Args:
        sets: of images from files.
    Raises:
        ValueError: the system cannot do that, or the images would take too much of the free memory.
    """
    # The first rank of those that see each other's processes fills the memory.
    spaces = dist.allgather_object(process_space())
    first = spaces.index(process_space())
    memory = None
    content = None
    failure = None
    if first == dist.get_rank():
        try:
            memory, places = fill_memory([without_transform(images) for images in sets])
            content = memory.paths, places
        except ValueError as error:
            failure = error
    dist.raise_together(failure)

    # The other ones open it while that rank holds it open.
    paths, places = dist.allgather_object(content)[first]
    if memory is None:
        memory = FilesAtOffsets(paths)
        memory.read(0, 0, 1)
    dist.barrier()
    return [CachedImages(images, memory, part) for images, part in zip(sets, places, strict=True)]


def without_transform(images: Dataset) -> Dataset:
    """The same data set, whose items are (PIL image, class id)."""
    images = copy.copy(images)
    images.transform = None
    return images


def fill_memory(sets: list[Dataset]) -> tuple[FilesAtOffsets, list[Places]]:
    """Decode all images of data sets into memory.

    Args:
        sets: items are (PIL image, class id).
    Returns:
        The memory, and where the images of every data set are in it.
    Raises:
        ValueError: see `cached_in_memory`.
    """
    if not hasattr(os, 'memfd_create'):
        raise ValueError('--cache=memory needs Linux: leave it out')
    num_images = sum(map(len, sets))
    free = free_memory()
    require_room(expected_bytes(sets), free, num_images)

    # Memory without a name vanishes with the last process that uses it, however that ends.
    descriptor = os.memfd_create('images')
    memory = FilesAtOffsets([f'/proc/{os.getpid()}/fd/{descriptor}'])
    memory.descriptors[0] = descriptor
    position = 0
    places = []
    with progress_bar(num_images, 'decoding') as bar:
        for images in sets:
            part = Places(np.zeros(len(images), np.int64), np.zeros((len(images), 2), np.int32))
            decoded = map_ahead(pixels_reader(images), range(len(images)), available_cpus())
            for index, (pixels, sides) in enumerate(decoded):
                require_room(position + len(pixels), free, num_images)
                part.begins_N[index] = position
                part.sides_N2[index] = sides
                position += write_all(descriptor, pixels, position)
                bar.update(1)
            places.append(part)
    logger.info('%d images are decoded into %.1f MiB of memory', num_images, position / MIB)
    return memory, places


def pixels_reader(images: Dataset) -> Callable[[int], tuple[bytes, tuple[int, int]]]:
    """A call that gives (RGB pixels, (height, width)) of an image; none of one that cannot be read."""
    def read(index: int) -> tuple[bytes, tuple[int, int]]:
        try:
            image, _ = images[index]
        except ImageError:
            return b'', (0, 0)
        return image.tobytes(), (image.height, image.width)

    return read


def expected_bytes(sets: list[Dataset]) -> int:
    """Bytes of the decoded images of data sets, by the mean of some of them that are evenly spread."""
    total = 0.
    for images in sets:
        count = min(len(images), NUM_EXAMPLES)
        read = pixels_reader(images)
        sizes = [len(read(i * len(images) // count)[0]) for i in range(count)]
        total += len(images) * float(np.mean(sizes))
    return int(total)


def require_room(num_bytes: int, free: int | None, num_images: int) -> None:
    """Make sure that the cache leaves memory for everything else.

    Args:
        num_bytes: of the cache.
        free: bytes of memory that were free before; None where that is unknown.
        num_images: number of images, for the message.
    Raises:
        ValueError: it does not.
    """
    if free is not None and num_bytes > SHARE * free:
        raise ValueError(f'--cache=memory needs {num_bytes / MIB:,.0f} MiB or more for {num_images} decoded '
                         f'images, and may take half of the {free / MIB:,.0f} MiB that are free: leave it '
                         'out, or make the images smaller')


def write_all(descriptor: int, content: bytes, offset: int) -> int:
    """Write bytes at a place of a file; returns their number."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written
    return len(content)
