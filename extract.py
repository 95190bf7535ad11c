"""Encode a data set once: `torchrun extract.py --model=flowar --data_path=ROOT --cached_path=OUT`.

Runs without torchrun, too. Writes the tokens of the centre crop of every image, or of random (`--views`)
or ten (`--ten_crop`) crops, and of their mirror images: codes for VAR, FlexVAR and NPP, moments of the KL-16
posterior for FlowAR. `train.py --cached_path=OUT` then needs no encoder. A killed job continues by the same
command; an import begins anew. Read it from `extract`.
Letters: B images of a batch, A views of an image (itself, crops, mirror images).
"""
import hashlib
import logging
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import dist
from configs import CONFIGS
from configs import FAMILIES as GENERATORS
from configs.options import INF, check_values, expand_paths, ints, make_parser, opt
from configs.training import CROP_KINDS, CROPS, PATCH_NUMS, VAL_SPLIT_HELP, VAL_SPLIT_LIMITS
from models import FAMILIES, Tokenizer, build_tokenizer
from utils.checkpoint import load_file, lock_folder, tokenizer_weights
from utils.data import MirroredCrops, build_transforms, check_labels, open_split, ten_crop_views
from utils.hub import fetch
from utils.log import one_line_errors, progress_bar, setup_logging
from utils.machine import automatic_workers
from utils.misc import allow_tf32
from utils.token_cache import (
    BEGUN,
    MANIFEST,
    CodeFiles,
    FilesWriter,
    PackedWriter,
    begin_or_continue,
    read_description,
    weights_digest,
    write_description,
    write_labels,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of an extraction. Flags are those of the published scripts."""

    IGNORED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(('vq_model', 'vae_embed_dim', 'codebook_size', 'codebook_embed_dim'),
                        'it is read from the file of the tokenizer'),
        'global_seed': 'nothing here is random but the crops of --views, which follow from --seed',
        **dict.fromkeys(('dataset', 'debug'), '--data_path is read, with torchrun or without')}

    model: str = opt('flowar', f'generator that the tokens are for: {", ".join(GENERATORS)}',
                     choices=GENERATORS)
    vae_ckpt: str = opt('', 'tokenizer weights, any file', 'vae_path vq_ckpt', path=True)
    data_path: str = opt('/path/to/imagenet', 'data set, as for train.py', path=True)
    cached_path: str = opt('', 'folder of the tokens', 'cached_path code_path', path=True)
    split: str = opt('train', 'train or val', choices=('train', 'val'))
    val_split: float = opt(0.0, 'as for train.py, ' + VAL_SPLIT_HELP, limits=VAL_SPLIT_LIMITS)
    exif: bool = opt(True, 'turn images as their EXIF orientation says, as in training')
    image_size: int = opt(256, 'side of the crops in pixels', 'img_size image_size', limits=(1, INF))
    pn: str = opt('', 'var: sides of the code maps as for train.py; empty takes those in the file of the '
                      'tokenizer, or else the published ones')
    views: int = opt(0, 'random crops of every image, as training takes them, in place of the centre crop of '
                        'its validation', limits=(0, INF))
    seed: int = opt(0, 'views: of the random crops', limits=(0, 2 ** 63 - 1))
    crop: str = opt('', f'as for train.py, {CROPS}; empty is that of the training, but vae for centre crops '
                        'of flowar', choices=('', *CROP_KINDS))
    mid_reso: float | None = opt(None, 'as for train.py; None is that of the training', limits=(1, INF))
    ten_crop: bool = opt(False, 'corners and centre of a larger centre crop, instead of the centre alone')
    crop_range: float = opt(1.1, 'ten_crop: how much larger; published: 1.1, then 1.05 into another folder',
                            limits=(1, INF))
    layout: str = opt('packed', 'packed: one array; files: one npz per image, as published with MAR',
                      choices=('packed', 'files'))
    import_codes: str = opt('', 'pack the codes in this folder: one file per image, as published', path=True)
    batch_size: int = opt(128, 'views per batch', limits=(1, INF))
    workers: int = opt(-1, 'loader processes per rank; -1 is automatic, up to the published 10; 0 loads in '
                           'the main process', 'num_workers', limits=(-1, INF))
    tf32: bool = opt(True, 'allow TF32 products on CUDA')

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        training = CONFIGS[self.model]
        if not self.crop:
            # The published cache of FlowAR has the centre crops of ADM, though training resizes as VAR does.
            is_published = self.model == 'flowar' and not self.views
            object.__setattr__(self, 'crop', 'vae' if is_published else training.crop)
        if self.mid_reso is None:
            object.__setattr__(self, 'mid_reso', training.mid_reso)
        if self.workers < 0:
            batch_bytes = self.batch_size * 3 * self.image_size ** 2 * 4
            object.__setattr__(self, 'workers', automatic_workers(10, batch_bytes))
        if not self.cached_path:
            raise ValueError('expected a folder for the tokens: pass --cached_path=FOLDER')
        if self.layout == 'files' and (self.model != 'flowar' or self.ten_crop or self.views):
            raise ValueError('--layout=files is of latents of the centre crop alone: leave it out')
        if self.import_codes and self.model != 'npp':
            raise ValueError('--import_codes is of published codes of NPP: pass --model=npp')
        if self.pn and self.model != 'var':
            raise ValueError(f'--pn is of VAR, a cache of {self.model} needs none: leave it out')
        if list(self.patch_nums) != sorted(self.patch_nums):
            raise ValueError(f'--pn must go from coarse to fine, got {self.pn}')
        if self.views and self.ten_crop:
            raise ValueError('--views and --ten_crop are two kinds of crops: pass one of them')
        if self.views and self.split == 'val':
            raise ValueError('validation sees the centre crop alone: leave out --views')
        if not (self.vae_ckpt or self.import_codes):
            raise ValueError('expected the weights of a tokenizer: pass --vae_path=FILE')

    @property
    def num_views(self) -> int:
        """Number of views of every image: its crops and their mirror images."""
        return 10 if self.ten_crop else 2 * max(self.views, 1)

    @property
    def patch_nums(self) -> tuple[int, ...]:
        """Sides of the code maps; () takes those in the file of the tokenizer."""
        return ints(PATCH_NUMS.get(self.pn, self.pn)) if self.pn else ()

    def describe_crops(self) -> dict[str, Any]:
        """What decides the views, for the manifest; None where a setting changes nothing."""
        if self.views:
            return dict(views=self.views, crop=self.crop, mid_reso=self.mid_reso, seed=self.seed)
        if not self.ten_crop and self.crop == 'resize':
            return dict(views=0, crop='resize', mid_reso=self.mid_reso, seed=None)
        return dict(views=0, crop='adm', mid_reso=None, seed=None)


def extract(settings: ExtractSettings) -> None:
    """Write all tokens that are not there yet, and the manifest when none is missing; every rank calls it.

    Raises:
        ValueError: a file cannot be used, the folder belongs to another extraction, or the disk is full.
    """
    allow_tf32(settings.tf32)
    device = dist.get_device()
    folder = Path(settings.cached_path)

    # The tokenizer, which must have codes for images of this size.
    path = fetch(settings.vae_ckpt)
    state, config = tokenizer_weights(load_file(path))
    sides = dict(v_patch_nums=settings.patch_nums) if settings.pn else {}
    tokenizer = build_tokenizer(FAMILIES[settings.model].tokenizer, state, str(path), device,
                                **config | sides)
    tokenizer.map_size(settings.image_size, settings.image_size)
    if tokenizer.fixed_image_size not in (None, settings.image_size):
        raise ValueError(f'the code maps of {path} are of images of {tokenizer.fixed_image_size} pixels, got '
                         f'--image_size={settings.image_size}: pass that size, or the --pn of the training')

    # The views of every image, made by the loader's processes.
    images, views = open_views(settings)
    names = image_names(images)

    # Everything that decides the tokens and their order: a cache never mixes two of these descriptions.
    description = dict(
        tokenizer=weights_digest(tokenizer.state_dict()),
        image_size=settings.image_size,
        count=len(images),
        crop_range=settings.crop_range if settings.ten_crop else 0.,
        layout=settings.layout,
        split=settings.split,
        exif=settings.exif,
        classes=list(images.classes),
        images=hashlib.sha256('\n'.join(names).encode()).hexdigest(),
        **settings.describe_crops(),
        **tokenizer.settings_of_codes(),
    )
    dist.require_equal(description, 'what is extracted', 'every node must see the same files')
    writer = open_writer(settings, folder, names, tokenizer, device)

    with lock_folder(folder) if dist.is_master() else nullcontext():
        if dist.is_master():
            remarks = dict(ckpt=str(path), data_path=settings.data_path)
            begin_or_continue(folder, description, remarks)
            writer.create()
        dist.barrier()

        # No rank may write before every rank has looked, or the ranks would not agree on what is missing.
        missing = writer.open()
        dist.barrier()
        begin = len(missing) * dist.get_rank() // dist.get_world_size()
        end = len(missing) * (dist.get_rank() + 1) // dist.get_world_size()
        encode(settings, tokenizer, writer, views, missing[begin:end])
        dist.barrier()

        # The manifest says that the cache is complete, so it is written last, after a second look.
        if dist.is_master():
            missing = writer.open()
            if missing:
                raise ValueError(f'expected tokens of all {len(images)} images in {folder}, {len(missing)} '
                                 'are missing: run the same command again')
            finish(folder, read_description(folder / BEGUN), images.targets)
        dist.barrier()


def open_views(settings: ExtractSettings) -> tuple[Dataset, Dataset]:
    """The images of the split, and a data set with (views (A, 3, H, W) in [-1, 1], class id) of each."""
    size = settings.image_size
    if settings.ten_crop:
        ten_crops = partial(ten_crop_views, size=size, crop_range=settings.crop_range)
        images = open_split(settings.data_path, settings.split, ten_crops, settings.exif,
                            settings.val_split)
        return images, images
    images = open_split(settings.data_path, settings.split, exif=settings.exif, val_split=settings.val_split)
    random_crop, centre_crop = build_transforms(size, False, settings.mid_reso, settings.crop)
    if settings.views:
        return images, MirroredCrops(images, random_crop, settings.views, settings.seed)
    return images, MirroredCrops(images, centre_crop)


def image_names(images: Dataset) -> list[str]:
    """`<class>/<path>` of every image; the path is relative to its class folder, or else to its split.

    Embedded data sets have no paths, and their images are named by index.
    """
    if hasattr(images, 'names'):
        files = [PurePath(name).as_posix() for name in images.names()]
    else:
        files = [f'{i:06d}' for i in range(len(images))]
    names = []
    for file, label in zip(files, images.targets, strict=True):
        class_name = images.classes[label]
        names.append(file if file.startswith(f'{class_name}/') else f'{class_name}/{file}')
    return names


def open_writer(settings: ExtractSettings, folder: Path, names: list[str], tokenizer: Tokenizer,
                device: torch.device) -> PackedWriter | FilesWriter:
    """The writer for the layout of the settings."""
    if settings.layout == 'files':
        return FilesWriter(folder, names)
    # The tokens of a black image show the shape and type of those of every view.
    side = settings.image_size
    black_113HW = torch.zeros(1, 1, 3, side, side, device=device)
    example = tokens_of(tokenizer, black_113HW)
    shape = (settings.num_views, *example.shape[2:])
    return PackedWriter(folder, len(names), shape, example.dtype)


def encode(settings: ExtractSettings, tokenizer: Tokenizer, writer: PackedWriter | FilesWriter,
           views: Dataset, own: list[int]) -> None:
    """Compute and write the tokens of the images of this rank.

    Args:
        views: items are (views (A, 3, H, W), class id).
        own: indices of the images of this rank, ascending.
    """
    device = next(tokenizer.parameters()).device
    images_per_batch = max(1, settings.batch_size // settings.num_views)
    loader = DataLoader(
        Subset(views, own),
        images_per_batch,
        num_workers=settings.workers,
        pin_memory=device.type == 'cuda',
    )
    done = 0
    with torch.inference_mode(), progress_bar(len(own), settings.cached_path) as bar:
        for views_BA3HW, _ in loader:
            index_B = own[done:done + len(views_BA3HW)]
            tokens_BA = tokens_of(tokenizer, views_BA3HW.to(device, non_blocking=True))
            writer.put(index_B, tokens_BA)
            done += len(index_B)
            bar.update(len(index_B))
    writer.flush()


def tokens_of(tokenizer: Tokenizer, views_BA3HW: torch.Tensor) -> np.ndarray:
    """The tokens (B, A, ...) of views in [-1, 1]: float32 latents, or codes as small unsigned integers.

    Views are encoded one by one, so that the memory does not grow with their number.
    """
    views = [tokenizer.precompute(view_B3HW) for view_B3HW in views_BA3HW.unbind(1)]
    tokens = torch.stack(views, dim=1)
    if tokenizer.vocab_size is None:
        dtype = np.float32
    else:
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    return tokens.cpu().numpy().astype(dtype, copy=False)


def finish(folder: Path, description: dict[str, Any], labels: list[int]) -> None:
    """Mark a cache as complete.

    Args:
        description: what the cache is made of, for the manifest.
        labels: class ids of all images, in their order.
    """
    write_labels(folder, labels)
    write_description(folder / MANIFEST, description)
    logger.info('the tokens of %d images are in %s', len(labels), folder)


def import_codes(settings: ExtractSettings) -> None:
    """Pack published codes into a cache; which tokenizer they belong to is unknown, as are names of classes.

    Raises:
        ValueError: the folder holds a complete cache already, or a file is missing or damaged.
    """
    files = CodeFiles(Path(settings.import_codes), settings.image_size)
    folder = Path(settings.cached_path)
    description = dict(
        tokenizer=None,
        image_size=settings.image_size,
        count=files.count,
        import_codes=str(Path(settings.import_codes).resolve()),
    )
    with lock_folder(folder), progress_bar(files.count, str(folder)) as bar:
        if (folder / MANIFEST).is_file():
            raise ValueError(f'{folder} holds a complete cache: pass another folder')
        begin_or_continue(folder, description, {})
        writer = None
        labels = []
        for index, (codes_AL, label) in enumerate(files):
            # The first file tells the number of views and tokens of all of them.
            if writer is None:
                writer = PackedWriter(folder, files.count, codes_AL.shape, np.uint16)
                writer.create()
                writer.open()

            # A code above 65,535 would not fit into the array, and a map must be square to be one of NPP.
            low = codes_AL.min(initial=0)
            high = codes_AL.max(initial=0)
            is_square = codes_AL.ndim == 2 and math.isqrt(codes_AL.shape[1]) ** 2 == codes_AL.shape[1]
            if codes_AL.shape != writer.shape or not is_square or low < 0 or high >= 2 ** 16 or label < 0:
                raise ValueError(f'expected views of a square map, {writer.shape}, codes in 0..65,535, and '
                                 f'a label as {index}.npy in {files.codes}, got {codes_AL.shape} of '
                                 f'{low}..{high} and {label}: extract it again')
            writer.put([index], codes_AL[None])
            labels.append(label)
            bar.update(1)
        writer.flush()

        # Classes have no names there, so they are named by their ids.
        check_labels(labels, str(files.labels))
        classes = [str(label) for label in range(max(labels) + 1)]
        finish(folder, read_description(folder / BEGUN) | dict(classes=classes), labels)


def main() -> None:
    """Encode the data set, or import the codes, of the command line."""
    parser = make_parser(ExtractSettings, 'extract.py', 'Encode a data set once.')
    values = parser.parse(sys.argv[1:])
    try:
        settings = ExtractSettings(**values)
    except ValueError as error:
        parser.error(str(error))
    dist.initialize()
    setup_logging(None, dist.is_master())
    if not settings.import_codes:
        extract(settings)
    elif dist.is_master():
        import_codes(settings)
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('extract.py'):
        main()
