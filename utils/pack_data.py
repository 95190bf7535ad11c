"""Pack a data set into tar files: `python -m utils.pack_data FOLDER OUT`, then `train.py --data_path=OUT`.

A million small files are slow to copy and to open, a few large ones are not. Order, names, classes and pixels
stay the same, so that a training may change from the folder to the tar files at any step. The files are
copied as they are, and any tar program reads them. A killed job goes on with the first tar file that is
missing, by the same command; equal data sets give equal tar files.

An entry point: unlike the rest of utils it knows the command lines of `configs`.
"""
import logging
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.options import INF, check_values, expand_paths, opt, parse_settings
from configs.training import VAL_SPLIT_HELP, VAL_SPLIT_LIMITS
from utils.console import one_line_errors
from utils.data import ClassFolders, ListedImages, describe_data, open_both
from utils.files import atomic_path, lock_folder, sync_folder
from utils.image_sets import NUM_READERS
from utils.image_store import map_ahead
from utils.images import is_regular
from utils.log import progress_bar, setup_logging
from utils.shards import BEGUN, INDEX, ShardIndex, read_index

logger = logging.getLogger(__name__)
MIB = 2 ** 20
YEAR_1980 = 315532800  # seconds; the time of every file, so that a copy of the data gives equal tar files


@dataclass(frozen=True)
class PackSettings:
    """Settings of `python -m utils.pack_data`."""

    folder: str = opt('', 'data set, as for train.py', positional=True, path=True)
    output: str = opt('', 'folder of the tar files', positional=True, path=True)
    shard_mb: int = opt(1024, 'largest size of a tar file in MiB', limits=(1, INF))
    val_split: float = opt(0.0, VAL_SPLIT_HELP, limits=VAL_SPLIT_LIMITS)

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        if not (self.folder and self.output):
            raise ValueError('expected FOLDER and OUT: python -m utils.pack_data FOLDER OUT')


def pack(settings: PackSettings) -> None:
    """Write the tar files that are not there yet, and the indices when none is missing.

    Raises:
        ValueError: the data set cannot be packed, the output folder holds another one, or a file has changed
            since packing began.
    """
    train_set, val_set = open_both(settings.folder, val_split=settings.val_split)
    if not isinstance(train_set, ClassFolders | ListedImages):
        raise ValueError(f'expected a folder of image files, {settings.folder!r} is packed or embedded '
                         'already: pass it to train.py as it is')
    output = Path(settings.output)
    with lock_folder(output):
        # Where every byte will be is written down before the first tar file, so that a start that goes on
        # with the work of another one needs to look at nothing but the sizes of the tar files.
        splits = [Packing(train_set, 'train', output, settings.shard_mb),
                  Packing(val_set, 'val', output, settings.shard_mb)]
        with progress_bar(len(train_set) + len(val_set), settings.output) as bar:
            for split in splits:
                for number in range(len(split.plan.shards)):
                    bar.update(split.write_shard(number))

        # The indices make it a data set, so they come last.
        for split in splits:
            split.finish()
        sync_folder(output)
    sizes = [size for split in splits for size in split.plan.shards.values()]
    logger.info('%d images are in %d tar files of %.1f MiB in all in %s', len(train_set) + len(val_set),
                len(sizes), sum(sizes) / MIB, output)


class Packing:
    """The packing of one split.

    Args:
        images: of the split.
        split: 'train' or 'val'.
        output: folder of the tar files.
        shard_mb: largest size of a tar file in MiB.
    Raises:
        ValueError: the folder holds, or was begun with, other images or another size.
    """

    def __init__(self, images: ClassFolders | ListedImages, split: str, output: Path, shard_mb: int):
        self.split = split
        self.output = output
        self.names = images.names()
        self.paths = [images.path_of(index) for index in range(len(images))]
        self.classes = list(images.classes)
        self.targets = images.targets
        self.begun_path = output / BEGUN.format(split=split)
        self.index_path = output / INDEX.format(split=split)
        made_of = describe_data(images) | dict(shard_mb=shard_mb)
        earlier = self._earlier_plan()
        if earlier is None:
            self.plan = self._new_plan(shard_mb * MIB, made_of)
            self.plan.save(self.begun_path)
            return
        differing = [key for key, value in made_of.items() if earlier.made_of.get(key) != value]
        if earlier.classes != self.classes:
            differing.append('list of classes')
        if differing:
            raise ValueError(f'{str(output)!r} was begun with another {", ".join(differing)} of {split}: '
                             'pass another folder, or remove that one')
        self.plan = earlier

    def _earlier_plan(self) -> ShardIndex | None:
        """The plan of an earlier start; None if there was none."""
        for path in (self.index_path, self.begun_path):
            if path.is_file():
                return read_index(path)
        return None

    def _new_plan(self, shard_bytes: int, made_of: dict) -> ShardIndex:
        """All images in their order, in tar files that end before they are larger than `shard_bytes`.

        An image that is larger by itself gets a tar file of its own.
        """
        sizes = []
        shards: list[int] = []  # sizes of the tar files
        shards_N = []
        offsets_N = []
        position = 0
        for path, name, size in zip(self.paths, self.names, map_ahead(size_of, self.paths, NUM_READERS),
                                    strict=True):
            if size is None:
                logger.warning('there is no file %r: an empty one takes its place, which training replaces',
                               path)
                size = 0
            header = tar_header(self.split, name, size)
            end = position + len(header) + padded(size, tarfile.BLOCKSIZE)
            if not shards or tar_size(end) > shard_bytes:
                end -= position
                position = 0
                shards.append(0)
            sizes.append(size)
            shards_N.append(len(shards) - 1)
            offsets_N.append(position + len(header))
            shards[-1] = tar_size(end)
            position = end
        return ShardIndex(
            classes=self.classes,
            shards={f'{self.split}-{number:05d}.tar': size for number, size in enumerate(shards)},
            made_of=made_of,
            names=np.frombuffer(os.fsencode(''.join(f'{name}\0' for name in self.names)), np.uint8),
            labels_N=np.asarray(self.targets, np.int32),
            shards_N=np.asarray(shards_N, np.int32),
            offsets_N=np.asarray(offsets_N, np.int64),
            sizes_N=np.asarray(sizes, np.int64),
        )

    def write_shard(self, number: int) -> int:
        """Write a tar file, unless it is there with its planned size.

        Returns:
            The number of its images.
        Raises:
            ValueError: a file cannot be read, or has another size than planned.
        """
        name = list(self.plan.shards)[number]
        size = self.plan.shards[name]
        path = self.output / name
        begin, end = np.searchsorted(self.plan.shards_N, [number, number + 1]).tolist()
        if not (path.is_file() and path.stat().st_size == size):
            with atomic_path(path) as temporary, temporary.open('wb') as file:
                for block in self._blocks(begin, end):
                    file.write(block)
                file.write(bytes(size - file.tell()))
        return end - begin

    def _blocks(self, begin: int, end: int) -> Iterator[bytes]:
        """What a tar file holds of the images from `begin` to `end`: headers, contents, zeros after them."""
        paths = self.paths[begin:end]
        sizes = self.plan.sizes_N[begin:end].tolist()
        contents = map_ahead(content_of, zip(paths, sizes, strict=True), NUM_READERS)
        for name, size, content in zip(self.names[begin:end], sizes, contents, strict=True):
            yield tar_header(self.split, name, size)
            yield content
            yield bytes(padded(size, tarfile.BLOCKSIZE) - size)

    def finish(self) -> None:
        """Write the index."""
        self.plan.save(self.index_path)
        self.begun_path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- files
def size_of(path: str) -> int | None:
    """Bytes of a file; None if there is no such file, or something else in its place.

    Raises:
        ValueError: it may not be looked at.
    """
    try:
        return os.stat(path).st_size if is_regular(path) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _not_readable(path, error) from None


def content_of(path_and_size: tuple[str, int]) -> bytes:
    """The bytes of a file, which has the planned size.

    Raises:
        ValueError: it cannot be read, or has another size.
    """
    path, size = path_and_size
    if size == 0:
        return b''  # there may be no file
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _not_readable(path, error) from None
    if len(content) != size:
        raise ValueError(f'{path!r} has {len(content):,} bytes, it had {size:,} when packing began: remove '
                         'what was packed, and run the same command again')
    return content


def _not_readable(path: str, error: OSError) -> ValueError:
    return ValueError(f'cannot read {path!r} ({error.strerror}): change its permissions, or remove it, and '
                      'run the same command again')


# ---------------------------------------------------------------------------------------------- tar
def tar_header(split: str, name: str, size: int) -> bytes:
    """What stands before the content of a file; all of them, extracted into one folder, are the data set."""
    entry = tarfile.TarInfo(f'{split}/{name.lstrip("/")}')
    entry.size = size
    entry.mtime = YEAR_1980
    return entry.tobuf(tarfile.GNU_FORMAT, 'utf-8', 'surrogateescape')


def tar_size(end: int) -> int:
    """Bytes of a tar file whose last content ends at `end`: two empty blocks follow, and whole records."""
    return padded(end + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def padded(size: int, block: int) -> int:
    """`size`, rounded up to whole blocks."""
    return -(-size // block) * block


def main() -> None:
    """Pack the data set of the command line."""
    settings = parse_settings(PackSettings, sys.argv[1:], 'pack_data', 'Pack a data set into tar files.')
    setup_logging(None, is_master=True)
    pack(settings)


if __name__ == '__main__':
    with one_line_errors('pack_data'):
        main()
