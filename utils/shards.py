"""Images packed into tar files by `utils.pack_data`, which training reads at random places.

Beside the tar files of a split lies its index, `train.index.npz`: names, classes, and where in which tar file
the bytes of every image are. Order, names and classes are those of the folder that was packed.
Letters: N images.
"""
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from utils.files import atomic_path
from utils.images import decode_image, image_errors, reason_of

INDEX = '{split}.index.npz'
BEGUN = '{split}.index.begun.npz'  # the same content, before all tar files are there
KIND = 'packed images 1'           # the first number of this format
UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile)  # of numpy


@dataclass
class ShardIndex:
    """Where the images of a split are.

    Attributes:
        classes: names of the classes, by label.
        shards: size in bytes of every tar file, by name.
        made_of: number and digest of the images, and the settings that decide the tar files.
        names: names of all images, each as bytes that end with a zero byte. One array, and not a million
            texts: counting references to them would copy their pages of memory into every loader process.
        labels_N: class ids.
        shards_N: which tar file an image is in, by its place in `shards`.
        offsets_N: where in the tar file the bytes of the image begin.
        sizes_N: how many bytes it has.
    """
    classes: list[str]
    shards: dict[str, int]
    made_of: dict[str, Any]
    names: np.ndarray
    labels_N: np.ndarray
    shards_N: np.ndarray
    offsets_N: np.ndarray
    sizes_N: np.ndarray

    def save(self, path: Path) -> None:
        """Write the index, whole or not at all; equal indices give equal files."""
        header = dict(kind=KIND, classes=self.classes, shards=self.shards, made_of=self.made_of)
        with atomic_path(path) as temporary, temporary.open('wb') as file:
            np.savez_compressed(
                file,
                header=np.frombuffer(json.dumps(header).encode(), np.uint8),
                names=self.names,
                labels=self.labels_N,
                shards=self.shards_N,
                offsets=self.offsets_N,
                sizes=self.sizes_N,
            )

    def check(self) -> None:
        """Make sure that the parts fit each other.

        Raises:
            ValueError: they do not; the message tells only what is wrong.
        """
        count = len(self.labels_N)
        lengths = {len(self.labels_N), len(self.shards_N), len(self.offsets_N), len(self.sizes_N),
                   int((self.names == 0).sum()), self.made_of['count']}
        if len(lengths) > 1 or not count:
            raise ValueError(f'numbers of images in its parts: {sorted(lengths)}')
        if self.labels_N.min() < 0 or self.labels_N.max() >= len(self.classes):
            raise ValueError(f'labels in {self.labels_N.min()}..{self.labels_N.max()} of {len(self.classes)} '
                             'classes')
        shard_bytes = np.array(list(self.shards.values()), np.int64)
        ends_N = self.offsets_N + self.sizes_N
        if self.offsets_N.min() < 0 or self.sizes_N.min() < 0 or (ends_N > shard_bytes[self.shards_N]).any():
            raise ValueError('images lie outside the tar files')


def read_index(path: Path) -> ShardIndex:
    """The index in a file.

    Raises:
        ValueError: it cannot be read, or is no index.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file['header'].tobytes())
            if header['kind'] != KIND:
                raise ValueError(f'its kind is {header["kind"]!r}')
            index = ShardIndex(
                header['classes'],
                header['shards'],
                header['made_of'],
                file['names'],
                file['labels'],
                file['shards'],
                file['offsets'],
                file['sizes'],
            )
        index.check()
    except UNREADABLE as error:
        raise ValueError(f'expected the index of packed images in {str(path)!r}, cannot read it '
                         f'({reason_of(error)}): copy it again, or remove it and run the same '
                         'utils.pack_data command again') from None
    return index


def is_packed(folder: Path) -> bool:
    """Whether a folder holds packed images, or some that are not all packed yet."""
    names = [name.format(split=split) for name in (INDEX, BEGUN) for split in ('train', 'val')]
    return any((folder / name).is_file() for name in names)


class FilesAtOffsets:
    """Reads bytes at any place in files, which are opened when they are first needed, once in every process.

    A read does not move a position in the file, so threads and forked processes may share what is open.
    Another process that gets a pickled copy opens the files itself.

    Args:
        paths: the files, named by their place here.
    """

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.descriptors: dict[int, int] = {}

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes of file `number` from `offset` on.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        descriptor = self._descriptor(number)
        parts = []
        while size > 0:
            part = os.pread(descriptor, size, offset)
            if not part:
                raise OSError(f'{self.paths[number]} has become shorter')
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b''.join(parts)

    def _descriptor(self, number: int) -> int:
        if number in self.descriptors:
            return self.descriptors[number]
        opened = os.open(self.paths[number], os.O_RDONLY | os.O_CLOEXEC)
        kept = self.descriptors.setdefault(number, opened)
        if kept != opened:  # another thread was faster
            os.close(opened)
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | dict(descriptors={})

    def __del__(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


class PackedImages(Dataset):
    """The images of one split in a folder of `utils.pack_data`; items are (image, class id).

    Args:
        folder: of the tar files and the index.
        split: 'train' or 'val'.
        transform: PIL image -> tensor.
        upright: turn images as their EXIF orientation says.
    Raises:
        ValueError: the index is missing or damaged, or a tar file is missing or has another size.
    """

    def __init__(self, folder: Path, split: str, transform: Callable | None = None, upright: bool = True):
        path = folder / INDEX.format(split=split)
        if not path.is_file():
            if (folder / BEGUN.format(split=split)).is_file():
                raise ValueError(f'the images in {str(folder)!r} are not all packed yet: run the same '
                                 'utils.pack_data command again')
            raise ValueError(f'expected the index of packed images {str(path)!r}, found no such file: copy '
                             'it again, or run the same utils.pack_data command again')
        self.index = read_index(path)
        for name, num_bytes in self.index.shards.items():
            _check_shard(folder / name, num_bytes)
        self.files = FilesAtOffsets([str(folder / name) for name in self.index.shards])
        self.classes = self.index.classes
        self.targets = self.index.labels_N
        self.ends_N = np.flatnonzero(self.index.names == 0)
        self.transform = transform
        self.upright = upright

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple:
        image = self.read(index)
        return self.transform(image) if self.transform else image, int(self.targets[index])

    def read(self, index: int) -> Image.Image:
        """The RGB image.

        Raises:
            ImageError: it cannot be read; the message names the tar file and the image in it.
        """
        with image_errors(self.path_of(index), 'repair the file and pack the images again'):
            content = self.files.read(
                int(self.index.shards_N[index]),
                int(self.index.offsets_N[index]),
                int(self.index.sizes_N[index]),
            )
            return decode_image(io.BytesIO(content), self.upright)

    def names(self) -> list[str]:
        """Names of all images, relative to the folder of the split that was packed."""
        return os.fsdecode(self.index.names.tobytes()).split('\0')[:-1]

    def path_of(self, index: int) -> str:
        """'<tar file>: <name of the image>', for messages."""
        begin = self.ends_N[index - 1] + 1 if index > 0 else 0
        name = os.fsdecode(self.index.names[begin:self.ends_N[index]].tobytes())
        return f'{self.files.paths[self.index.shards_N[index]]}: {name}'


def _check_shard(path: Path, num_bytes: int) -> None:
    """Make sure that a tar file is there, with as many bytes as the index says."""
    remedy = 'copy it again, or run the same utils.pack_data command again'
    if not path.is_file():
        raise ValueError(f'expected packed images in {str(path)!r}, found no such file: {remedy}')
    found = path.stat().st_size
    if found != num_bytes:
        raise ValueError(f'expected {num_bytes:,} bytes in {str(path)!r}, got {found:,}: {remedy}')
