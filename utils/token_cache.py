"""Tokens on disk: `extract.py` encodes a data set once, and training reads its tokens in place of the images.

A cache has several views of every image: crops of it, then those of its mirror image.
Letters: N images, A views of each image, B images of a batch; "..." is the shape of the tokens of one view.
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

from utils.checkpoint import atomic_path
from utils.files import read_json, write_text
from utils.image_sets import read_npy

logger = logging.getLogger(__name__)
UNREADABLE = (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile)  # what numpy raises
BEGUN = 'settings.json'      # describes what the cache is made of, written first
MANIFEST = 'manifest.json'   # the same description, written when the cache is complete
VIEW_NAMES = ('moments', 'moments_flip')  # the views in a published file of latents
FLUSH_EVERY = 4096           # images between two syncs with the disk
EARLIER = dict(              # settings that earlier versions did not write down, with their value then
    exif=False, views=0, crop='adm', mid_reso=None, seed=None, codebook_l2_norm=True)
ENCODER = (                  # prefixes of the weights that decide the tokens
    'encoder.', 'quant_conv.', 'quantize.embedding.', 'quantize.quant_resi.')


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the names and values of the weights that decide the tokens, whatever file they came in.

    The decoder is left out: a tokenizer whose decoder was trained further gives the same tokens.
    """
    digest = hashlib.sha256()
    for name, t in sorted(state.items()):
        if name.startswith(ENCODER):
            values = t.detach().cpu().contiguous().reshape(-1)
            digest.update(name.encode())
            digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def read_description(path: Path) -> dict[str, Any]:
    """The description of what a cache is made of; {} if there is no such file.

    Raises:
        ValueError: the file cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f'expected JSON in {path}, cannot read it ({error}): extract again, into another '
                         'folder') from None


def write_description(path: Path, description: dict[str, Any]) -> None:
    """Write the description of what a cache is made of as JSON, whole or not at all."""
    write_text(path, json.dumps(description, indent=1) + '\n')


def begin_or_continue(folder: Path, description: dict[str, Any], remarks: dict[str, Any]) -> None:
    """Make sure that a folder belongs to this extraction alone, and write down what the cache is made of.

    Args:
        description: what decides the tokens; it must be the same whenever the extraction continues.
        remarks: what may differ then, such as paths.
    Raises:
        ValueError: another extraction was begun in this folder.
    """
    begun = read_description(folder / BEGUN)
    if begun:
        begun = EARLIER | begun
        differing = sorted(name for name in description if begun.get(name) != description[name])
        if differing:
            raise ValueError(f'{str(folder)!r} was begun with another {", ".join(differing)} (see '
                             f'{str(folder / BEGUN)!r}): pass another folder, or remove that one')
    write_description(folder / BEGUN, description | remarks)


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
            num_images = self.shape[0]
            if not len(self.targets) == num_images == manifest.get('count', num_images):
                raise ValueError(f'{len(self.targets)} labels, {num_images} images')
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
        """The tokens (...) of one view of an image."""
        return self._array()[index, view]


class MomentFiles:
    """`<class>/<file name>.npz` with `moments` and `moments_flip`, as published with MAR."""

    num_views = len(VIEW_NAMES)

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
        # One array each, and not a million objects: counting references to them would copy their pages of
        # memory into every loader process.
        self.paths = np.array(paths, dtype=np.bytes_)
        self.targets = np.array(targets, dtype=np.int64)

    def read(self, index: int, view: int) -> np.ndarray:
        """The tokens (...) of one view of an image.

        Raises:
            ValueError: its file is missing or damaged.
        """
        path = self.folder / os.fsdecode(self.paths[index])
        try:
            with np.load(path) as file:
                return file[VIEW_NAMES[view]]
        except UNREADABLE as error:
            raise ValueError(f'expected {VIEW_NAMES[view]} in {path}, cannot read it ({error}): '
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
    """Codes in one file per image, as published with NPP, in the order of their indices.

    `<data set><size>_codes/<index>.npy` holds the codes (1, A, L) of an image,
    `<data set><size>_labels/<index>.npy` its label (1,).

    Raises:
        ValueError: a folder or a file is missing, or a file is damaged.
    """

    def __init__(self, folder: Path, image_size: int, dataset: str = 'imagenet'):
        self.codes = folder / f'{dataset}{image_size}_codes'
        self.labels = folder / f'{dataset}{image_size}_labels'
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
                codes_AL = read_npy(self.codes / f'{index}.npy')[0]
                label = int(read_npy(self.labels / f'{index}.npy')[0])
                yield codes_AL, label
            except UNREADABLE as error:
                raise ValueError(f'expected {index}.npy, one of {self.count}, in {self.codes} and '
                                 f'{self.labels}, cannot read it ({error}): extract it again') from None


class TokenCache(Dataset):
    """(tokens of one view, class id) per image: float32 latents or int64 codes.

    Args:
        folders: caches of the same images, joined by commas; every access picks one of them at random.
        hflip: whether views of the mirror image may be picked, too.
        fixed: always read the first view of the first cache, as validation must.
    Raises:
        ValueError: a cache is missing or incomplete, or holds other images than the first one.
    """

    def __init__(self, folders: str | Path, hflip: bool = True, fixed: bool = False):
        self.folders = [Path(name) for name in str(folders).split(',')]
        self.manifests = [read_description(folder / MANIFEST) for folder in self.folders]
        self.parts = []
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            self.parts.append(self._open(folder, manifest))
        self.hflip = hflip
        self.fixed = fixed
        self.classes = self.parts[0].classes
        self.targets = self.parts[0].targets

        # Image i must be the same image in every cache, since an access picks one of them.
        images = self.manifests[0].get('images')
        shapes = [part.read(0, 0).shape for part in self.parts]
        shape = shapes[0]
        for i, (folder, part) in enumerate(zip(self.folders, self.parts, strict=True)):
            manifest = self.manifests[i]
            shape_here = shapes[i]
            has_same_images = manifest.get('images', images) == images
            has_same_labels = np.array_equal(part.targets, self.targets)
            if not (has_same_images and has_same_labels and shape_here == shape):
                raise ValueError(f'{folder} holds {len(part.targets)} images with tokens of {shape_here}, '
                                 f'{self.folders[0]} {len(self.targets)} with {shape}, or in another '
                                 'order: pass caches of the same images and size')

    @staticmethod
    def _open(folder: Path, manifest: dict[str, Any]) -> PackedTokens | MomentFiles:
        """The reader for the layout of a folder; a folder that cannot be read is refused with the remedy."""
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

    def check(self, digest: str, settings: dict[str, Any], image_size: int, split: str,
              shape: tuple[int, ...]) -> None:
        """Make sure that the tokens belong to this tokenizer, size and split, as far as the caches say so.

        Args:
            digest: of the tokenizer, see `weights_digest`.
            settings: of the tokenizer, see `Tokenizer.settings_of_codes`.
            image_size: side of the images of this training in pixels.
            split: train or val.
            shape: of the tokens of a view.
        Raises:
            ValueError: a cache was made otherwise.
        """
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            if not manifest.get('tokenizer'):
                logger.warning('%s does not say which tokenizer it is of: make sure it is yours', folder)
            elif manifest['tokenizer'] != digest:
                raise ValueError(f'{folder} holds tokens of another tokenizer ({manifest.get("ckpt")}): '
                                 'pass that one, or extract the cache again')
            for name, value in settings.items():
                there = manifest.get(name, value)
                if there != value:
                    raise ValueError(f'{folder} holds tokens of a tokenizer with {name}={there}, this '
                                     f'training has {name}={value}: pass the same flags, or extract the '
                                     'cache again')
            if manifest.get('split', split) != split:
                raise ValueError(f'{folder} holds tokens of the split {manifest["split"]}, expected {split}: '
                                 '--cached_path is for training, --cached_val_path for validation')
            if manifest.get('image_size', image_size) != image_size:
                raise ValueError(f'{folder} holds tokens of images of {manifest["image_size"]} pixels, this '
                                 f'training has {image_size}: pass that size, or extract the cache again')
        found = self.parts[0].read(0, 0).shape
        if found != shape:
            raise ValueError(f'{self.folders[0]} holds tokens of {found}, this '
                             f'tokenizer gives {shape} for {image_size} pixels: extract the cache again')

    def warn_of_other_crops(self, exif: bool, crop: str, mid_reso: float) -> None:
        """Name in the log what was prepared otherwise than this training prepares images.

        Args:
            exif: whether images are turned as their EXIF orientation says.
            crop, mid_reso: see `build_transforms`.
        """
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            if manifest and (EARLIER | manifest)['exif'] != exif:
                logger.warning('%s was extracted with --exif=%d, this training has --exif=%d, so photos with '
                               'an EXIF orientation are turned differently: pass --exif=%d, or extract the '
                               'cache again', folder, not exif, exif, not exif)
            # Published crops do not depend on these settings, and their manifest holds None.
            crop_there = manifest.get('crop')
            mid_reso_there = manifest.get('mid_reso')
            if mid_reso_there is not None and (crop_there, mid_reso_there) != (crop, mid_reso):
                logger.warning('%s was extracted with --crop=%s --mid_reso=%g, this training crops images by '
                               '--crop=%s --mid_reso=%g: pass the same ones, or extract the cache again',
                               folder, crop_there, mid_reso_there, crop, mid_reso)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        part = self.parts[0]
        view = 0
        # From torch's generator, which `KeyedAugmentation` seeds: the view follows from (seed, epoch, index).
        if not self.fixed:
            part = self.parts[int(torch.randint(len(self.parts), ()))]
            num_views = part.num_views if self.hflip else max(part.num_views // 2, 1)
            view = int(torch.randint(num_views, ()))
        tokens = np.array(part.read(index, view))
        dtype = np.float32 if tokens.dtype.kind == 'f' else np.int64
        return torch.from_numpy(tokens.astype(dtype, copy=False)), int(self.targets[index])


# ---------------------------------------------------------------------------------------------- writing
class PackedWriter:
    """Writes the packed layout; several processes may write into one folder, each its own images.

    `done.npy` holds a byte per image that is on disk, so that an interrupted extraction continues.

    Args:
        count: N.
        shape: (A, ...), that of the tokens of one image.
        dtype: of the tokens.
    Raises:
        ValueError: the disk is too small, or the folder holds an array of another shape.
    """

    def __init__(self, folder: Path, count: int, shape: tuple[int, ...], dtype: np.dtype):
        self.folder = folder
        self.count = count
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.record = self.dtype.itemsize * int(np.prod(shape))  # bytes per image
        self.pending: list[int] = []  # images that are written, but perhaps not on disk yet

    def create(self) -> None:
        """Make the files, with all the room they need; one process calls it, before any calls `open`."""
        self._create('tokens.npy', (self.count, *self.shape), self.dtype)
        self._create('done.npy', (self.count,), np.dtype(np.uint8))

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Make an array file filled with zeros, unless an earlier run has made it."""
        path = self.folder / name
        if path.is_file():
            array = np.load(path, mmap_mode='r')
            if (array.shape, array.dtype) != (shape, dtype):
                raise ValueError(f'{path} holds {array.dtype} of {array.shape}, expected {dtype} of '
                                 f'{shape}: it is of another extraction, pass another folder')
            return
        with atomic_path(path) as temporary, temporary.open('wb') as file:
            header = dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            size = file.tell() + dtype.itemsize * int(np.prod(shape))
            # A full disk is found now, and not after hours of encoding.
            try:
                if hasattr(os, 'posix_fallocate'):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            except OSError as error:
                raise self._no_room(error) from None

    def open(self) -> list[int]:
        """Open the files for writing, and give the indices of the images that are not there yet."""
        self.files = {}
        self.begin = {}
        for name in ('tokens.npy', 'done.npy'):
            self.begin[name] = np.load(self.folder / name, mmap_mode='r').offset
            self.files[name] = os.open(self.folder / name, os.O_RDWR)
        return np.flatnonzero(np.load(self.folder / 'done.npy') == 0).tolist()

    def put(self, index_B: Sequence[int], tokens_BA: np.ndarray) -> None:
        """Store the tokens (B, A, ...) of these images.

        Raises:
            ValueError: the disk is full.
        """
        for index, tokens in zip(index_B, tokens_BA, strict=True):
            content = np.ascontiguousarray(tokens, dtype=self.dtype)
            offset = self.begin['tokens.npy'] + index * self.record
            try:
                os.pwrite(self.files['tokens.npy'], content, offset)
            except OSError as error:
                raise self._no_room(error) from None
        self.pending += index_B
        if len(self.pending) >= FLUSH_EVERY:
            self.flush()

    def _no_room(self, error: OSError) -> ValueError:
        return ValueError(f'expected room for {self.count * self.record:,} bytes in {self.folder}, got '
                          f'{error}: free some space, and run the same command again')

    def flush(self) -> None:
        """Wait for the disk, then record which images are there."""
        # In this order: after a power cut no image may be recorded whose tokens are lost.
        os.fsync(self.files['tokens.npy'])
        for index in self.pending:
            os.pwrite(self.files['done.npy'], b'\1', self.begin['done.npy'] + index)
        self.pending.clear()


class FilesWriter:
    """Writes latents in the published layout, one npz per image; its methods are those of `PackedWriter`.

    Args:
        names: path of the npz file of every image in the folder, without its ending.
    """

    def __init__(self, folder: Path, names: list[str]):
        self.paths = [folder / f'{name}.npz' for name in names]

    def create(self) -> None:
        """Make sure that every image has a file of its own.

        Raises:
            ValueError: two images have the same name.
        """
        if len(set(self.paths)) < len(self.paths):
            twice = next(path for i, path in enumerate(self.paths) if path in self.paths[:i])
            raise ValueError(f'expected one file name per image, {twice} is that of two: leave out '
                             '--layout=files')

    def open(self) -> list[int]:
        """Indices of the images that are not there yet."""
        return [i for i, path in enumerate(self.paths) if not path.is_file()]

    def put(self, index_B: Sequence[int], tokens_BA: np.ndarray) -> None:
        """Store the latents (B, 2, ...) of these images and of their mirror images."""
        for index, views in zip(index_B, tokens_BA, strict=True):
            path = self.paths[index]
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays = dict(zip(VIEW_NAMES, views, strict=True))
            with atomic_path(path) as temporary, temporary.open('wb') as file:
                np.savez(file, **arrays)

    def flush(self) -> None:
        """Nothing is left to do, as every file is on disk once it has its name."""


def write_labels(folder: Path, labels: Sequence[int]) -> None:
    """Write the class ids of all images, int64 (N,)."""
    with atomic_path(folder / 'labels.npy') as temporary, temporary.open('wb') as file:
        np.save(file, np.array(labels, dtype=np.int64))
