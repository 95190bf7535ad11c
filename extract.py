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
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from configs.extraction import ExtractSettings, parse_extraction
from utils.console import announce, one_line_errors

if __name__ == '__main__':
    # Wrong flags and missing files are answered now: the imports below take seconds.
    with one_line_errors('extract.py'):
        command = parse_extraction(sys.argv[1:])
        command.require_files()
    announce('extract.py', 'loading torch, the tokenizer and the images')

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import dist
from models import FAMILIES, Tokenizer, build_tokenizer
from utils.checkpoint import load_file, lock_folder, tokenizer_weights
from utils.data import MirroredCrops, build_transforms, check_labels, open_split, ten_crop_views
from utils.hub import fetch
from utils.log import progress_bar, setup_logging
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


def main(settings: ExtractSettings | None = None) -> None:
    """Encode the data set, or import the codes; None takes the settings of the command line."""
    settings = settings or parse_extraction(sys.argv[1:])
    dist.initialize()
    setup_logging(None, dist.is_master())
    if not settings.import_codes:
        extract(settings)
    elif dist.is_master():
        import_codes(settings)
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('extract.py'):
        main(command)
