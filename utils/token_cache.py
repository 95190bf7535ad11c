"""Tokens on disk: what `extract.py` writes of a data set, read in the place of its images.

Of every image there are several views: the image itself or crops of it, then the same of its mirror image.
Letters: N images, A views of each; the rest of a shape is that of the tokens of one view.
"""
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from utils.batches import read_npy
from utils.checkpoint import atomic_path
from utils.files import read_json, write_text

logger = logging.getLogger(__name__)
UNREADABLE = (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile)  # what numpy raises
BEGUN = 'settings.json'      # what the cache is made of, written first
MANIFEST = 'manifest.json'   # the same content, written when the cache is complete
NAMES = ('moments', 'moments_flip')                 # the views of a published file of latents
FLUSH_EVERY = 4096                                  # images between two syncs with the disk
EARLIER = dict(exif=False)  # settings that earlier versions did not note, as they were then
ENCODER = ('encoder.', 'quant_conv.', 'quantize.embedding.')  # what decides the tokens of an image


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the names and values of the weights that decide the tokens, whatever file they came in."""
    digest = hashlib.sha256()
    for name, t in sorted(state.items()):
        if name.startswith(ENCODER):
            digest.update(name.encode())
            digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_note(path: Path) -> dict[str, Any]:
    """What a cache is made of; empty where there is no such file.

    Raises:
        ValueError: it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f'expected JSON in {path}, cannot read it ({error}): extract again, into another '
                         'folder') from None


def write_note(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one go."""
    write_text(path, json.dumps(content, indent=1) + '\n')


def claim(folder: Path, description: dict[str, Any], remarks: dict[str, Any]) -> None:
    """Note what an extraction into this folder is made of.

    Args:
        description: must be the same whenever it continues. remarks: need not.
    Raises:
        ValueError: another extraction was begun there.
    """
    begun = read_note(folder / BEGUN)
    if begun:
        begun = EARLIER | begun
    differing = sorted(name for name in description if begun and begun.get(name) != description[name])
    if differing:
        raise ValueError(f'{str(folder)!r} was begun with another {", ".join(differing)} (see '
                         f'{str(folder / BEGUN)!r}): pass another folder, or remove that one')
    write_note(folder / BEGUN, description | remarks)


# ---------------------------------------------------------------------------------------------- reading
class PackedTokens:
    """`tokens.npy` (N, A, ...) with `labels.npy` (N,): one array for all images.

    Raises:
        ValueError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.path = folder / 'tokens.npy'
        self.mapped = None
        try:
            self.classes = manifest['classes']
            self.targets = read_npy(folder / 'labels.npy')
            self.shape = self._array().shape
            if not len(self.targets) == self.shape[0] == manifest.get('count', self.shape[0]):
                raise ValueError(f'{len(self.targets)} labels, {self.shape[0]} images')
        except UNREADABLE as error:
            raise ValueError(f'expected {MANIFEST}, labels.npy and tokens.npy in {folder}, cannot read them '
                             f'({error!r}): copy the whole folder, or extract again') from None
        self.num_views = self.shape[1]

    def _array(self) -> np.ndarray:
        if self.mapped is None:
            self.mapped = np.load(self.path, mmap_mode='r')
        return self.mapped

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | dict(mapped=None)  # a loader process maps the file itself

    def read(self, index: int, view: int) -> np.ndarray:
        return self._array()[index, view]


class MomentFiles:
    """`<class>/<file name>.npz` with `moments` and `moments_flip`, as published with MAR."""

    num_views = len(NAMES)

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self.classes = manifest.get('classes', found)
        paths = []
        targets = []
        for label, name in enumerate(self.classes):
            files = sorted(_npz_files(f'{folder}/{name}'))
            paths += [f'{name}/{file}' for file in files]
            targets += [label] * len(files)
        # one array, not a million objects, whose reference counts would copy them into every loader process
        self.paths = np.array(paths, dtype=np.bytes_)
        self.targets = np.array(targets, dtype=np.int64)

    def read(self, index: int, view: int) -> np.ndarray:
        path = self.folder / os.fsdecode(self.paths[index])
        try:
            with np.load(path) as file:
                return file[NAMES[view]]
        except UNREADABLE as error:
            raise ValueError(f'expected {NAMES[view]} in {path}, cannot read it ({error}): '
                             'remove the file and run extract.py again') from None


def _npz_files(folder: str, inside: str = '') -> Iterator[str]:
    """Paths of npz files below a folder, relative to it."""
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _npz_files(entry.path, f'{inside}{entry.name}/')
        elif entry.name.endswith('.npz'):
            yield inside + entry.name


class CodeFiles:
    """One file per image, as published with NPP, in this order.

    `<data set><size>_codes/<index>.npy` holds its codes (1, A, L), `<data set><size>_labels/<index>.npy` its
    label (1,).

    Raises:
        ValueError: a folder is missing, named exactly, or a file of the sequence is.
    """

    def __init__(self, folder: Path, image_size: int, dataset: str = 'imagenet'):
        self.codes, self.labels = (folder / f'{dataset}{image_size}_{kind}' for kind in ('codes', 'labels'))
        for path in (self.codes, self.labels):
            if not path.is_dir():
                raise ValueError(f'expected one npy file per image in {path}, found no such folder: '
                                 'pass the --image_size and the folder that they were extracted with')
        self.count = sum(entry.name.endswith('.npy') for entry in os.scandir(self.codes))
        if not self.count:
            raise ValueError(f'expected one npy file per image in {self.codes}, found none: extract again')

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """(codes (A, L), label) of every image, by index."""
        for index in range(self.count):
            try:
                codes = read_npy(self.codes / f'{index}.npy')
                yield codes[0], int(read_npy(self.labels / f'{index}.npy')[0])
            except UNREADABLE as error:
                raise ValueError(f'expected {index}.npy, one of {self.count}, in {self.codes} and '
                                 f'{self.labels}, cannot read it ({error}): extract it again') from None


class TokenCache(Dataset):
    """(tokens of one view, class id) per image: float32 latents or int64 codes.

    Args:
        folders: one or several of the same images, joined by commas; every access picks one at random.
        hflip: pick from the views of mirror images, too.
        fixed: always the first view of the first folder, for validation.
    Raises:
        ValueError: a cache is absent or incomplete, or of other images than the first.
    """

    def __init__(self, folders: str | Path, hflip: bool = True, fixed: bool = False):
        self.folders = [Path(name) for name in str(folders).split(',')]
        self.manifests = [read_note(folder / MANIFEST) for folder in self.folders]
        self.parts = [self._open(*part) for part in zip(self.folders, self.manifests, strict=True)]
        self.hflip = hflip
        self.fixed = fixed
        self.classes = self.parts[0].classes
        self.targets = self.parts[0].targets
        shapes = [part.read(0, 0).shape for part in self.parts]
        first = self.manifests[0].get('images')
        for i, (folder, part) in enumerate(zip(self.folders, self.parts, strict=True)):
            same = self.manifests[i].get('images', first) == first and shapes[i] == shapes[0]
            if not same or not np.array_equal(part.targets, self.targets):
                raise ValueError(f'{folder} holds {len(part.targets)} images with tokens of {shapes[i]}, '
                                 f'{self.folders[0]} {len(self.targets)} with {shapes[0]}, or in another '
                                 'order: pass caches of the same images and size')

    @staticmethod
    def _open(folder: Path, manifest: dict[str, Any]) -> PackedTokens | MomentFiles:
        if not folder.is_dir():
            raise ValueError(f'expected tokens in {folder}, found no such folder: run extract.py, or pass '
                             'another folder')
        if not manifest and (folder / BEGUN).is_file():
            raise ValueError(f'{folder} is not complete: run the same extract.py command again')
        if (folder / 'tokens.npy').is_file():
            return PackedTokens(folder, manifest)
        published = next(folder.glob('*_codes'), None)
        if published:
            raise ValueError(f'{folder} holds one file per image ({published.name}): pack them once by '
                             f'extract.py --model=npp --import_codes={folder} --code_path=ANOTHER')
        files = MomentFiles(folder, manifest)
        if not len(files.paths):
            raise ValueError(f'expected tokens.npy or class folders of npz files in {folder}, found neither: '
                             'run extract.py, or pass another folder')
        if len(files.paths) != manifest.get('count', len(files.paths)):
            raise ValueError(f'expected {manifest["count"]} npz files in {folder}, found {len(files.paths)}: '
                             'copy the whole folder, or extract again')
        return files

    def check(self, digest: str, image_size: int, split: str, shape: tuple[int, ...], exif: bool) -> None:
        """Make sure that the tokens are of this tokenizer, size and split, as far as the caches tell.

        Args:
            digest: see `weights_digest`. split: train or val.
            shape: of the tokens of a view.
            exif: whether this training turns images as their EXIF orientation says; a cache that was made
                otherwise is named in the log.
        Raises:
            ValueError: they are not.
        """
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            if not manifest.get('tokenizer'):
                logger.warning('%s does not say which tokenizer it is of: make sure it is yours', folder)
            elif manifest['tokenizer'] != digest:
                raise ValueError(f'{folder} holds tokens of another tokenizer ({manifest.get("ckpt")}): '
                                 'pass that one, or extract the cache again')
            if manifest.get('split', split) != split:
                raise ValueError(f'{folder} holds tokens of the split {manifest["split"]}, expected {split}: '
                                 '--cached_path is for training, --cached_val_path for validation')
            if manifest.get('image_size', image_size) != image_size:
                raise ValueError(f'{folder} holds tokens of images of {manifest["image_size"]} pixels, this '
                                 f'training has {image_size}: pass that size, or extract the cache again')
            if manifest and (EARLIER | manifest)['exif'] != exif:
                logger.warning('%s was extracted with --exif=%d, this training has --exif=%d, so photos with '
                               'an EXIF orientation are turned differently: pass --exif=%d, or extract the '
                               'cache again', folder, not exif, exif, not exif)
        if self.parts[0].read(0, 0).shape != shape:
            raise ValueError(f'{self.folders[0]} holds tokens of {self.parts[0].read(0, 0).shape}, this '
                             f'tokenizer gives {shape} for {image_size} pixels: extract the cache again')

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        # torch's generator, which `KeyedAugmentation` seeds
        part = self.parts[0 if self.fixed else int(torch.randint(len(self.parts), ()))]
        num_views = part.num_views if self.hflip else max(part.num_views // 2, 1)
        tokens = np.array(part.read(index, 0 if self.fixed else int(torch.randint(num_views, ()))))
        kind = np.float32 if tokens.dtype.kind == 'f' else np.int64
        return torch.from_numpy(tokens.astype(kind, copy=False)), int(self.targets[index])


# ---------------------------------------------------------------------------------------------- writing
class PackedWriter:
    """Writes the packed layout; several processes may share it, each with its own images.

    `done.npy` holds a byte per image that is on disk, so that an interrupted extraction continues.

    Args:
        shape: (A, ...) of one image.
    Raises:
        ValueError: the disk is too small, or the folder holds an array of another shape.
    """

    def __init__(self, folder: Path, count: int, shape: tuple[int, ...], dtype: np.dtype):
        self.folder = folder
        self.count = count
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.record = self.dtype.itemsize * int(np.prod(shape))  # bytes per image
        self.pending: list[int] = []  # written, perhaps not on disk yet

    def create(self) -> None:
        """Make the files, with all the room they need; one process calls it, before any calls `open`."""
        for name, shape, dtype in (('tokens.npy', (self.count, *self.shape), self.dtype),
                                   ('done.npy', (self.count,), np.dtype(np.uint8))):
            path = self.folder / name
            if path.is_file():
                array = np.load(path, mmap_mode='r')
                if (array.shape, array.dtype) != (shape, dtype):
                    raise ValueError(f'{path} holds {array.dtype} of {array.shape}, expected {dtype} of '
                                     f'{shape}: it is of another extraction, pass another folder')
                continue
            with atomic_path(path) as temporary, temporary.open('wb') as file:
                header = dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                size = file.tell() + dtype.itemsize * int(np.prod(shape))
                try:
                    if hasattr(os, 'posix_fallocate'):
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:
                        file.truncate(size)
                except OSError as error:
                    raise self._no_room(error) from None

    def open(self) -> list[int]:
        """Indices of the images that are not there yet."""
        self.files = {}
        self.begin = {}
        for name in ('tokens.npy', 'done.npy'):
            self.begin[name] = np.load(self.folder / name, mmap_mode='r').offset
            self.files[name] = os.open(self.folder / name, os.O_RDWR)
        return np.flatnonzero(np.load(self.folder / 'done.npy') == 0).tolist()

    def put(self, index_B: Sequence[int], tokens_BA: np.ndarray) -> None:
        """Store the tokens (B, A, ...) of images."""
        for index, tokens in zip(index_B, tokens_BA, strict=True):
            content = np.ascontiguousarray(tokens, dtype=self.dtype)
            try:
                os.pwrite(self.files['tokens.npy'], content, self.begin['tokens.npy'] + index * self.record)
            except OSError as error:
                raise self._no_room(error) from None
        self.pending += index_B
        if len(self.pending) >= FLUSH_EVERY:
            self.flush()

    def _no_room(self, error: OSError) -> ValueError:
        return ValueError(f'expected room for {self.count * self.record:,} bytes in {self.folder}, got '
                          f'{error}: free some space, and run the same command again')

    def flush(self) -> None:
        """Wait for the disk, then note which images are there."""
        os.fsync(self.files['tokens.npy'])
        for index in self.pending:
            os.pwrite(self.files['done.npy'], b'\1', self.begin['done.npy'] + index)
        self.pending.clear()


class FilesWriter:
    """Writes latents in the published layout; methods are those of `PackedWriter`.

    Args:
        names: path of every image's npz file in the folder, without its ending.
    """

    def __init__(self, folder: Path, names: list[str]):
        self.paths = [folder / f'{name}.npz' for name in names]

    def create(self) -> None:
        """Make sure that every image has a file of its own.

        Raises:
            ValueError: two have the same name.
        """
        if len(set(self.paths)) < len(self.paths):
            twice = next(path for i, path in enumerate(self.paths) if path in self.paths[:i])
            raise ValueError(f'expected one file name per image, {twice} is that of two: leave out '
                             '--layout=files')

    def open(self) -> list[int]:
        return [i for i, path in enumerate(self.paths) if not path.is_file()]

    def put(self, index_B: Sequence[int], tokens_BA: np.ndarray) -> None:
        for index, pair in zip(index_B, tokens_BA, strict=True):
            self.paths[index].parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.paths[index]) as temporary, temporary.open('wb') as file:
                np.savez(file, **dict(zip(NAMES, pair, strict=True)))

    def flush(self) -> None:
        pass


def write_labels(folder: Path, labels: Sequence[int]) -> None:
    """The class ids of a packed cache."""
    with atomic_path(folder / 'labels.npy') as temporary, temporary.open('wb') as file:
        np.save(file, np.array(labels, dtype=np.int64))
