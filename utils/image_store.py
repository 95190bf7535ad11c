"""Images of a sampling job on disk, by index, until they are packed: PNG files, or raw pieces of batches.

Every file appears whole or not at all, so whatever is there after a kill is good. Images are uint8 (H, W, 3).
"""
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.checkpoint import atomic_path
from utils.images import reason_of

MAX_WAITING = 512  # images in memory that wait until they are written: 100 MB at 256 pixels


def map_ahead(function: Callable[[Any], Any], items: Iterable[Any], num_threads: int) -> Iterator[Any]:
    """`map` whose calls run in threads, a few ahead of the caller; results keep the order of the items."""
    with ThreadPoolExecutor(num_threads) as threads:
        pending: deque[Future] = deque()
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > 4 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class ImageStore:
    """A folder of images by index, written by threads while the caller samples the next ones.

    Use it as a context manager: on leaving, everything is written or the first error is raised.

    Args:
        folder: where the images are.
        num_threads: number of threads that write and read.
    """

    def __init__(self, folder: str | Path, num_threads: int = 4):
        self.folder = Path(folder)
        self.num_threads = num_threads
        self.threads = ThreadPoolExecutor(num_threads)
        self.pending: deque[tuple[Future, int]] = deque()  # (files being written, their numbers of images)

    def stored(self, count: int) -> np.ndarray:
        """(count,) bool, whether each image is there."""
        raise NotImplementedError

    def put(self, index: np.ndarray, images: np.ndarray) -> None:
        """Write images (n, H, W, 3) of ascending indices, later; blocks while too many images are waiting."""
        raise NotImplementedError

    def get(self, i: int) -> np.ndarray:
        """Image i, uint8 (H, W, 3).

        Raises:
            ValueError: its file cannot be read.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Remove the files that are of no use once all images are packed."""

    def clear(self) -> None:
        """Remove all images."""
        raise NotImplementedError

    def read(self, order: Iterable[int]) -> Iterator[np.ndarray]:
        """Images in this order, read ahead."""
        return map_ahead(self.get, order, self.num_threads)

    def _write(self, *args: Any) -> None:
        """Write one file."""
        raise NotImplementedError

    def _write_or_explain(self, *args: Any) -> None:
        """Write one file; the error of a full disk says what to do."""
        try:
            self._write(*args)
        except OSError as error:
            raise OSError(f'could not write an image into {self.folder} ({error.strerror or error}): '
                          'free some space and run the same command again') from error

    def _submit(self, num_images: int, *args: Any) -> None:
        """Let a thread write a file of so many images."""
        future = self.threads.submit(self._write_or_explain, *args)
        self.pending.append((future, num_images))
        while len(self.pending) > 1 and sum(count for _, count in self.pending) > MAX_WAITING:
            oldest, _ = self.pending.popleft()
            oldest.result()  # waits, and raises if the file could not be written

    def __enter__(self) -> 'ImageStore':
        return self

    def __exit__(self, *error: Any) -> None:
        self.threads.shutdown()
        while self.pending and error[0] is None:
            future, _ = self.pending.popleft()
            future.result()


class PngStore(ImageStore):
    """One PNG file per image: 000000.png, ..."""

    def stored(self, count: int) -> np.ndarray:
        names = {path.name for path in self.folder.glob('*.png')}
        return np.array([self._path(i).name in names for i in range(count)], dtype=bool)

    def put(self, index: np.ndarray, images: np.ndarray) -> None:
        for i, image in zip(index, images, strict=True):
            self._submit(1, i, image)

    def get(self, i: int) -> np.ndarray:
        try:
            with Image.open(self._path(i)) as image:
                if image.mode != 'RGB':
                    raise ValueError(f'its mode is {image.mode}')
                return np.asarray(image)
        except MemoryError:
            raise
        except Exception as error:  # damaged headers make Pillow's readers raise anything
            raise ValueError(f'expected an image of sample.py, cannot read {str(self._path(i))!r} '
                             f'({reason_of(error)}): remove the file and run the same command '
                             'again') from None

    def clear(self) -> None:
        for path in self.folder.glob('*.png'):
            if re.fullmatch('[0-9]{6,}', path.stem):
                path.unlink()

    def _path(self, i: int) -> Path:
        return self.folder / f'{i:06d}.png'

    def _write(self, i: int, image: np.ndarray) -> None:
        with atomic_path(self._path(i)) as temporary:
            Image.fromarray(image).save(temporary, format='PNG')


class PieceStore(ImageStore):
    """Runs of consecutive images as arrays, named by the first image and the one after the last.

    They need no encoding and are few files, but nobody can look at them: they are packed and removed.
    """

    def __init__(self, folder: str | Path, num_threads: int = 4):
        super().__init__(folder, num_threads)
        self.pieces: dict[int, tuple[Path, int]] = {}  # image -> its file and its row there

    def stored(self, count: int) -> np.ndarray:
        self.pieces.clear()
        for path in self.folder.glob('pixels-*.npy'):
            name = re.fullmatch(r'pixels-([0-9]+)-([0-9]+)', path.stem)
            if name is None:
                continue
            first = int(name[1])
            end = int(name[2])
            for i in range(first, end):
                self.pieces[i] = (path, i - first)
        return np.array([i in self.pieces for i in range(count)], dtype=bool)

    def put(self, index: np.ndarray, images: np.ndarray) -> None:
        # Within a run of consecutive indices, index minus row is constant.
        for _, run in groupby(enumerate(index), key=lambda item: item[1] - item[0]):
            rows = [row for row, _ in run]
            first = index[rows[0]]
            self._submit(len(rows), first, images[rows])

    def get(self, i: int) -> np.ndarray:
        path, row = self.pieces[i]
        try:
            return np.load(path, mmap_mode='r')[row]
        except (OSError, EOFError, ValueError, IndexError) as error:
            raise ValueError(f'expected images of sample.py, cannot read {str(path)!r} ({reason_of(error)}): '
                             'remove the file and run the same command again') from None

    def discard(self) -> None:
        self.clear()

    def clear(self) -> None:
        for path in self.folder.glob('pixels-*.npy'):
            path.unlink()

    def _write(self, first: int, images: np.ndarray) -> None:
        end = first + len(images)
        path = self.folder / f'pixels-{first:06d}-{end:06d}.npy'
        with atomic_path(path) as temporary, temporary.open('wb') as file:
            np.save(file, images)


STORES: dict[str, type[ImageStore]] = {'png': PngStore, 'npz': PieceStore}
