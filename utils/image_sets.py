"""Sets of 8-bit images on disk: npz files (`arr_0` uint8 (N, H, W, 3)) and folders of PNG files.

All images of a set have one size. An npz is never loaded as a whole. `open_images` reads either kind,
`write_npz` and `pack_folder` write the first. Letters: N images, n images of a block, H height, W width.
"""
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from utils.checkpoint import atomic_path
from utils.files import SUFFIXES
from utils.hub import sha256_of
from utils.image_store import map_ahead
from utils.images import is_data, is_regular, reason_of
from utils.machine import available_cpus

NUM_READERS = min(8, available_cpus())  # threads that decode files
CONVERSIONS = {  # kind of file -> what its pixels become, for warnings; RGB stays as it is
    'JPEG': 'lossy, which changes FID',
    '1': 'black and white become RGB', 'L': 'grey becomes RGB', 'P': 'the palette becomes RGB',
    'LA': 'grey becomes RGB, opaque alpha is dropped', 'RGBA': 'opaque alpha is dropped',
}


class ImageSet:
    """Images of one size, in a fixed order.

    Attributes:
        path: the npz file or the folder.
        count: N.
        height: H in pixels.
        width: W in pixels.
        labels: (N,) int64 class ids in the order of the images, or None.
        warnings: what may change scores, one line each.
    """

    path: Path
    count: int
    height: int
    width: int
    labels: np.ndarray | None
    warnings: list[str]

    def blocks(self, begin: int = 0, end: int | None = None, size: int = 64) -> Iterator[np.ndarray]:
        """Images begin..end (exclusive, as in a slice) in blocks of `size`, the last one maybe smaller.

        Yields:
            uint8 (n, H, W, 3).
        Raises:
            ValueError: an image cannot be read.
        """
        raise NotImplementedError

    def __getitem__(self, i: int) -> np.ndarray:
        """Image i, uint8 (H, W, 3)."""
        raise NotImplementedError

    def sha256(self) -> str:
        """SHA-256 of the file, or of the names and contents of the images in a folder, in their order."""
        raise NotImplementedError


def open_images(path: str | Path, allow_jpeg: bool = True) -> ImageSet:
    """The images of an npz file or of a folder.

    Args:
        allow_jpeg: whether JPEG files in a folder are accepted, with a warning.
    Raises:
        ValueError: there are no 8-bit RGB images of one size; some defects show only when images are read.
    """
    if Path(path).is_dir():
        return FolderImages(path, allow_jpeg)
    return NpzImages(path)


# ---------------------------------------------------------------------------------------------- npz
def npz_keys(path: str | Path) -> tuple[str, ...]:
    """Names of the arrays in an npz file.

    Raises:
        ValueError: the file is missing or no npz.
    """
    with _open_npz(path) as archive:
        members = [name for name in archive.namelist() if name.endswith('.npy')]
    return tuple(name.removesuffix('.npy') for name in members)


class NpzImages(ImageSet):
    """`arr_0` of an npz file; `arr_1` are the labels if it has one integer per image.

    An array that is stored as it is gets mapped into memory; a compressed one can only be read in order.

    Raises:
        ValueError: the file holds no 8-bit RGB images, or is cut off.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.warnings = []
        keys = npz_keys(path)
        if 'arr_0' not in keys:
            raise ValueError(f'expected images as arr_0 in {path}, got the arrays '
                             f'{", ".join(keys) or "none"}: save them by np.savez(file, images)')
        with _open_npz(path) as archive, archive.open('arr_0.npy') as stream:
            shape, self.is_fortran, dtype = _read_header(stream, path)
            self.header_size = stream.tell()
            _check_images(shape, dtype, stream, path)
            info = archive.getinfo('arr_0.npy')
        num_bytes = info.file_size - self.header_size
        if num_bytes < prod(shape):
            raise _truncated(path, prod(shape), num_bytes)
        self.shape = shape
        self.is_stored = info.compress_type == zipfile.ZIP_STORED
        self.count, self.height, self.width, _ = shape
        if self.is_stored:
            # The array follows the local header of the zip: 30 bytes, the name, and an extra field.
            with self.path.open('rb') as file:
                file.seek(info.header_offset)
                name_size, extra_size = struct.unpack('<26x2H', file.read(30))
            self.offset = info.header_offset + 30 + name_size + extra_size
        elif self.is_fortran:
            raise ValueError(f'expected arr_0 in C order, got a compressed array in Fortran order in {path}: '
                             'store it by np.savez(file, np.ascontiguousarray(images))')

    @cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) int64 class ids, or None if `arr_1` is missing or something else."""
        if 'arr_1' not in npz_keys(self.path):
            return None
        with _open_npz(self.path) as archive, archive.open('arr_1.npy') as stream:
            shape, _, dtype = _read_header(stream, self.path)
            if shape != (self.count,) or dtype.kind not in 'iu':
                return None  # some other array
            data = _read(stream, self.count * dtype.itemsize, self.path)
        return np.frombuffer(data, dtype).astype(np.int64)

    def describe_array(self, name: str) -> str:
        """What an array of the file is, for a message: `float32 of shape (70,)`, or `none`."""
        if name not in npz_keys(self.path):
            return 'none'
        with _open_npz(self.path) as archive, archive.open(f'{name}.npy') as stream:
            shape, _, dtype = _read_header(stream, self.path)
        return f'{dtype} of shape {shape}'

    def blocks(self, begin: int = 0, end: int | None = None, size: int = 64) -> Iterator[np.ndarray]:
        begin, end, _ = slice(begin, end).indices(self.count)
        blocks = [slice(first, min(first + size, end)) for first in range(begin, end, size)]
        if self.is_stored:
            for rows in blocks:
                yield self._copy(rows)
            return

        # A compressed array is unpacked from its beginning; what comes before `begin` is thrown away.
        bytes_per_image = prod(self.shape[1:])
        with _open_npz(self.path) as archive, archive.open('arr_0.npy') as stream:
            stream.seek(self.header_size + begin * bytes_per_image)
            for rows in blocks:
                data = _read(stream, (rows.stop - rows.start) * bytes_per_image, self.path)
                yield np.frombuffer(bytearray(data), np.uint8).reshape(-1, *self.shape[1:])

    def __getitem__(self, i: int) -> np.ndarray:
        if not self.is_stored:
            raise ValueError('expected images that can be read in any order, got compressed ones in '
                             f'{self.path}: store them by np.savez')
        return self._copy(i)

    def _copy(self, rows: int | slice) -> np.ndarray:
        # Mapped anew each time: the pages of a map that stays would pile up in the memory of this process.
        images = np.memmap(self.path, np.uint8, 'r', self.offset + self.header_size, self.shape,
                           order='F' if self.is_fortran else 'C')
        return np.array(images[rows], order='C')

    def sha256(self) -> str:
        return sha256_of(self.path)


@contextmanager
def _open_npz(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """The zip file behind an npz; whatever is wrong with it becomes a ValueError, whenever that shows."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise ValueError(f'expected an npz file or a folder of images, found nothing at {path}: '
                         'check the path') from None
    except (OSError, EOFError, RuntimeError, UnicodeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f'expected an npz file, cannot read {path} ({error}): it is truncated or of another '
                         'format; copy it again, or write it by np.savez') from None


def _read_header(stream: IO[bytes], path: str | Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, dtype) of the array at the beginning of a stream."""
    try:
        # Version 3 differs from 2 in the encoding of field names, which images and labels do not have.
        if np.lib.format.read_magic(stream) == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        return np.lib.format.read_array_header_2_0(stream)
    except ValueError as error:
        raise ValueError(f'expected an array of numpy in {path}, cannot read its header '
                         f'({" ".join(str(error).split())[:200]}): write it by np.savez') from None


def read_npy(path: str | Path) -> np.ndarray:
    """The numbers in a .npy file, after its header was compared with the length of the file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no .npy file, holds objects, or holds fewer numbers than its header says.
    """
    with Path(path).open('rb') as file:
        shape, is_fortran, dtype = _read_header(file, path)
        if dtype.hasobject:
            raise ValueError(f'expected numbers in {path}, got objects, which are not read: store numbers')
        if min(shape, default=0) < 0:
            raise ValueError(f'expected an array in {path}, got the shape {shape}: the file is damaged')
        num_bytes = prod(shape) * dtype.itemsize
        found = os.fstat(file.fileno()).st_size - file.tell()
        if num_bytes > found:
            raise _truncated(path, num_bytes, found)
        data = _read(file, num_bytes, path)
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order='F' if is_fortran else 'C')


def read_npz_arrays(path: str | Path, shapes: dict[str, tuple[int, ...]],
                    kinds: str = 'fiu') -> list[np.ndarray]:
    """Arrays of an npz file by name; an array of another shape or kind is refused before it is unpacked.

    Args:
        shapes: the shape that each array must have, by its name.
        kinds: of data types that are accepted, as numpy abbreviates them.
    Returns:
        The arrays, in the order of `shapes`.
    Raises:
        ValueError: an array is missing or another than expected, or the file is damaged.
    """
    arrays = []
    with _open_npz(path) as archive:
        for name, expected in shapes.items():
            if f'{name}.npy' not in archive.namelist():
                raise ValueError(f'expected {" and ".join(shapes)} in {path}, it has no {name}: pass another '
                                 'file')
            with archive.open(f'{name}.npy') as stream:
                shape, is_fortran, dtype = _read_header(stream, path)
                if dtype.kind not in kinds:
                    raise ValueError(f'expected numbers as {name} of {path}, got {dtype}: pass another file')
                if shape != expected:
                    raise ValueError(f'expected {name} of shape {expected} in {path}, got {shape}: pass a '
                                     'file of the same network and size')
                data = _read(stream, prod(shape) * dtype.itemsize, path)
            order = 'F' if is_fortran else 'C'
            arrays.append(np.frombuffer(bytearray(data), dtype).reshape(shape, order=order))
    return arrays


def _read(stream: IO[bytes], num_bytes: int, path: str | Path) -> bytes:
    """The next `num_bytes` of a stream, all of them or an error."""
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise _truncated(path, num_bytes, len(data))
    return data


def _truncated(path: str | Path, expected: int, found: int) -> ValueError:
    return ValueError(f'expected {expected:,} more bytes of an array in {path}, got {found:,}: '
                      'it is truncated; copy or write the file again')


def _check_images(shape: tuple[int, ...], dtype: np.dtype, stream: IO[bytes], path: str | Path) -> None:
    """Refuse whatever is no (N, H, W, 3) array of uint8, with the conversion that it probably needs.

    Args:
        stream: continues with the values of the array.
    """
    if dtype.kind == 'f':
        # The range of the first values shows what black and white are, with some room, as the outputs of
        # decoders leave [0, 1] or [-1, 1] a little.
        data = stream.read(2 ** 20)
        values = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
        low = values.min(initial=0)
        high = values.max(initial=0)
        if high > 2:
            scale = 'x.round()'
        elif low < -0.1:
            scale = 'x * 127.5 + 128'
        else:
            scale = 'x * 255 + 0.5'
        raise ValueError(f'expected 8-bit images as arr_0 of {path}, got {dtype} with values from {low:g} to '
                         f'{high:g}: store ({scale}).clip(0, 255).astype(np.uint8)')
    if dtype != np.uint8:
        raise ValueError(f'expected 8-bit images as arr_0 of {path}, got {dtype}: store them as np.uint8')
    if len(shape) != 4 or shape[3] != 3:
        is_nchw = len(shape) == 4 and shape[1] == 3
        remedy = 'store RGB images'
        if is_nchw:
            remedy = 'channels come first, store images.transpose(0, 2, 3, 1)'
        raise ValueError(f'expected images (N, H, W, 3) as arr_0 of {path}, got shape {shape}: {remedy}')
    if min(shape) < 1:
        raise ValueError(f'expected images as arr_0 of {path}, got none, shape {shape}: sample some')


# ---------------------------------------------------------------------------------------------- folders
class FolderImages(ImageSet):
    """PNG and JPEG files directly in a folder, in the order of names; `labels.npy` holds their labels.

    Other files are ignored. The kind and size of every file are checked at once, its pixels when it is read.

    Raises:
        ValueError: there is no such folder or no image in it, or images differ in size or cannot be used.
    """

    def __init__(self, path: str | Path, allow_jpeg: bool = True):
        self.path = Path(path)
        self.warnings = []
        if not self.path.is_dir():
            raise ValueError(f'expected a folder of PNG files, found none at {str(path)!r}: check the path')
        files = [file for file in self.path.iterdir() if file.suffix.lower() in SUFFIXES]
        self.files = sorted(file for file in files if is_data(file.name))
        if not self.files:
            raise ValueError(f'expected PNG files directly in {str(path)!r}, found none: check the path')
        self.count = len(self.files)

        # The first file decides the size.
        kinds: dict[str, list[str]] = {}  # kind -> names of files
        for file in self.files:
            kind, (width, height) = _inspect(file)
            if file == self.files[0]:
                self.height = height
                self.width = width
            if (height, width) != (self.height, self.width):
                raise ValueError(f'expected images of {self.width}x{self.height} in {str(path)!r}, got '
                                 f'{width}x{height} in {file.name!r}: make all of one size, in a fresh '
                                 'folder')
            kinds.setdefault(kind, []).append(file.name)
        if 'JPEG' in kinds and not allow_jpeg:
            raise ValueError(f'expected PNG files in {str(path)!r}, got {len(kinds["JPEG"])} JPEG, first '
                             f'{kinds["JPEG"][0]!r}: JPEG is lossy and changes FID; save PNG, or allow JPEG')
        for kind, names in kinds.items():
            if kind != 'RGB':
                self.warnings.append(f'{kind} images in {str(path)!r}: {len(names)} of {self.count} files, '
                                     f'first {names[0]!r}; {CONVERSIONS[kind]}')

    @cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) int64 class ids, or None if there is no labels.npy.

        Raises:
            ValueError: the file cannot be read, or has another number of labels.
        """
        file = self.path / 'labels.npy'
        return read_labels(file, self.count) if file.exists() else None

    def blocks(self, begin: int = 0, end: int | None = None, size: int = 64) -> Iterator[np.ndarray]:
        begin, end, _ = slice(begin, end).indices(self.count)
        images = self.read(range(begin, end))
        while block := list(islice(images, size)):
            yield np.stack(block)

    def read(self, order: Iterable[int]) -> Iterator[np.ndarray]:
        """Images (H, W, 3) in this order, decoded ahead by threads."""
        return map_ahead(self.__getitem__, order, NUM_READERS)

    def __getitem__(self, i: int) -> np.ndarray:
        return _decode(self.files[i])

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for file, content in zip(self.files, map_ahead(sha256_of, self.files, NUM_READERS), strict=True):
            digest.update(os.fsencode(f'{file.name} {content}\n'))
        return digest.hexdigest()


def read_labels(path: str | Path, count: int) -> np.ndarray:
    """(count,) int64 class of every image, from a .npy file or a .txt file with one number per line.

    Raises:
        ValueError: the file cannot be read, or holds another number of integers.
    """
    try:
        if Path(path).suffix == '.txt':
            labels_N = np.loadtxt(path, dtype=np.int64, ndmin=1)
        else:
            labels_N = read_npy(path)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f'expected the class of every image in {path}, cannot read it ({error}): '
                         'pass a .npy file of integers, or a .txt file with one per line') from None
    if labels_N.shape != (count,) or labels_N.dtype.kind not in 'iu':
        raise ValueError(f'expected {count} integers in {path}, one per image, got {labels_N.dtype} of shape '
                         f'{labels_N.shape}: correct the labels, or the number of images')
    return labels_N.astype(np.int64)


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """A PNG or JPEG file; whatever goes wrong while it is read becomes a ValueError of one line."""
    try:
        if not is_regular(path):
            raise ValueError('it is no file')
        with Image.open(path, formats=('PNG', 'JPEG')) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # damaged headers make Pillow's readers raise anything
        raise ValueError(f'cannot read {str(path)!r} ({reason_of(error)}): remove the file and sample '
                         'again') from None


def _inspect(path: Path) -> tuple[str, tuple[int, int]]:
    """('JPEG' or the mode of a PNG, (width, height)), from the header alone."""
    with _open_image(path) as image:
        # By the raw mode, as Pillow gives 16-bit RGB as RGB, cut to 8 bits.
        is_16_bit = image.format == 'PNG' and '16' in image.tile[0][3]
    if is_16_bit:
        raise ValueError(f'expected images of 8 bits, got 16 bits in {str(path)!r}: save it with 8')
    kind = 'JPEG' if image.format == 'JPEG' else image.mode
    return kind, image.size


def _decode(path: Path) -> np.ndarray:
    """The pixels of a file, uint8 (H, W, 3); an image with transparent pixels is refused."""
    with _open_image(path) as image:
        has_alpha = 'A' in image.mode or 'transparency' in image.info
        image = image.convert('RGBA' if has_alpha else 'RGB')
    if has_alpha:
        *_, (lowest_alpha, _) = image.getextrema()
        if lowest_alpha < 255:
            raise ValueError(f'expected opaque images, got transparent pixels in {str(path)!r}: save it on a '
                             'background')
    return np.array(image)[..., :3]


# ---------------------------------------------------------------------------------------------- packing
def write_npz(path: str | Path, images: Iterable[np.ndarray], count: int, height: int, width: int,
              labels: np.ndarray | None = None, **arrays: np.ndarray) -> None:
    """Write an npz as FID evaluators read it: uncompressed, equal bytes for equal images and labels.

    Args:
        images: uint8 images (H, W, 3) or blocks (n, H, W, 3); one image or block at a time is in memory.
        count: N, the number of images in all.
        height: H in pixels.
        width: W in pixels.
        labels: (N,) integers, written as int64 under `arr_1`.
        arrays: further arrays of the file, by name.
    Raises:
        ValueError: an image has another size or type, or the number of images or labels is another one.
        OSError: the disk is full or not writable; what was at `path` before is intact.
    """
    if labels is not None and np.shape(labels) != (count,):
        raise ValueError(f'expected {count} labels for {path}, got shape {np.shape(labels)}: '
                         'give one per image')
    shape = (count, height, width, 3)
    num_written = 0
    try:
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, 'w') as archive:
            with _new_member(archive, 'arr_0.npy') as stream:
                header = dict(descr='|u1', fortran_order=False, shape=shape)
                np.lib.format.write_array_header_1_0(stream, header)
                for block in images:
                    if block.dtype != np.uint8 or block.shape[-3:] != shape[1:]:
                        raise ValueError(f'expected uint8 images of shape {shape[1:]} for {path}, got '
                                         f'{block.dtype} of {block.shape[-3:]} at image {num_written}: '
                                         'convert it first')
                    num_written += prod(block.shape[:-3])
                    if num_written > count:
                        break
                    stream.write(np.ascontiguousarray(block))
                if num_written != count:
                    found = 'more' if num_written > count else num_written
                    raise ValueError(f'expected {count} images for {path}, got {found}: '
                                     'complete them, or give their true number')
            if labels is not None:
                arrays = dict(arr_1=np.asarray(labels, np.int64)) | arrays
            for name, array in arrays.items():
                with _new_member(archive, f'{name}.npy') as stream:
                    np.lib.format.write_array(stream, array, (1, 0), allow_pickle=False)
    except OSError as error:
        raise OSError(f'could not write {path} ({error.strerror or error}): free some space, or write '
                      'elsewhere; nothing was changed') from error


def _new_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A new member of a zip archive, for writing.

    It is dated 1980, so that the bytes of the archive do not depend on the time. Its size is known only at
    the end, so it is written as a member that may be large (zip64).
    """
    return archive.open(zipfile.ZipInfo(name), 'w', force_zip64=True)


def shuffled(count: int, seed: int) -> np.ndarray:
    """(count,) int64: the order in which images are packed, a permutation of 0..count - 1.

    It comes from numpy's RandomState (MT19937, Fisher-Yates), whose numbers are the same in every version and
    on every platform.
    """
    return np.random.RandomState(seed).permutation(count).astype(np.int64)


def pack_folder(folder: str | Path, target: str | Path, count: int | None = None, seed: int | None = 0,
                allow_jpeg: bool = False) -> NpzImages:
    """Pack the images of a folder, and their labels, as an npz.

    The order is shuffled, since the Inception Score is a mean over chunks of the file and would be wrong if
    these held few classes each.

    Args:
        count: the number of images that the folder must hold; None takes all that are there.
        seed: of the order, see `shuffled`; None keeps the order of names.
        allow_jpeg: whether JPEG files are accepted, with a warning.
    Returns:
        The images of the npz, with the warnings about the folder.
    Raises:
        ValueError: the folder holds another number of images, or images that cannot be used.
        OSError: see `write_npz`.
    """
    images = FolderImages(folder, allow_jpeg)
    if count not in (None, images.count):
        raise ValueError(f'expected {count} images in {folder}, got {images.count}: '
                         'sample the missing ones or remove the surplus, or give another count')
    order = np.arange(images.count) if seed is None else shuffled(images.count, seed)
    labels = None if images.labels is None else images.labels[order]
    write_npz(target, images.read(order), images.count, images.height, images.width, labels)
    packed = NpzImages(target)
    packed.warnings += images.warnings
    return packed
