"""Encode a data set once: `torchrun extract.py --model=flowar --data_path=ROOT --cached_path=OUT`.

Runs without torchrun, too. Writes the tokens of every training image and of its mirror image: moments of the
KL-16 posterior for FlowAR, codes of VQ-16 for NPP, there also of ten crops. `train.py --cached_path=OUT` then
needs no encoder. A killed job continues by the same command; an import begins anew.
"""
import hashlib
import logging
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import dist
from configs.options import INF, check_values, expand_paths, make_parser, opt
from models import FAMILIES, Tokenizer, build_tokenizer
from utils.checkpoint import load_file, lock_folder, tokenizer_weights
from utils.data import check_labels, crop_views, open_split
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
    claim,
    read_note,
    weights_digest,
    write_labels,
    write_note,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of an extraction. Flags are those of the published scripts."""

    IGNORED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(('vq_model', 'vae_embed_dim', 'codebook_size', 'codebook_embed_dim'),
                        'it is read from the file of the tokenizer'),
        **dict.fromkeys(('seed', 'global_seed'), 'nothing here is random'),
        **dict.fromkeys(('dataset', 'debug'), '--data_path is read, with torchrun or without')}

    model: str = opt('flowar', 'generator that the tokens are for: flowar or npp', choices=('flowar', 'npp'))
    vae_ckpt: str = opt('', 'tokenizer weights, any file', 'vae_path vq_ckpt', path=True)
    data_path: str = opt('/path/to/imagenet', 'data set, as for train.py', path=True)
    cached_path: str = opt('', 'folder of the tokens', 'cached_path code_path', path=True)
    split: str = opt('train', 'train or val', choices=('train', 'val'))
    exif: bool = opt(True, 'turn images as their EXIF orientation says, as in training')
    image_size: int = opt(256, 'side of the crops in pixels', 'img_size image_size', limits=(1, INF))
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
        if self.workers < 0:
            batch_bytes = self.batch_size * 3 * self.image_size ** 2 * 4
            object.__setattr__(self, 'workers', automatic_workers(10, batch_bytes))
        if not self.cached_path:
            raise ValueError('expected a folder for the tokens: pass --cached_path=FOLDER')
        if self.layout == 'files' and (self.model != 'flowar' or self.ten_crop):
            raise ValueError('--layout=files is of latents of the centre crop alone: leave it out')
        if self.import_codes and self.model != 'npp':
            raise ValueError('--import_codes is of codes, not of latents: pass --model=npp')
        if not (self.vae_ckpt or self.import_codes):
            raise ValueError('expected the weights of a tokenizer: pass --vae_path=FILE')

    @property
    def num_views(self) -> int:
        """Of every image."""
        return 10 if self.ten_crop else 2


def image_names(images: Dataset, root: Path) -> list[str]:
    """`<class>/<path>` of every image, the path being that below its class folder, or else below `root`."""
    paths = [path for path, _ in getattr(images, 'samples', ())] or getattr(images, 'paths', ())
    classes = [images.classes[label] for label in images.targets]
    files = [Path(path).relative_to(root).as_posix() for path in paths] \
        or [f'{i:06d}' for i in range(len(images))]  # of embedded sets
    return [file if file.startswith(f'{name}/') else f'{name}/{file}'
            for name, file in zip(classes, files, strict=True)]


def tokens_of(tokenizer: Tokenizer, views_BA3HW: torch.Tensor) -> np.ndarray:
    """(B, A, ...) float32, or unsigned integers as small as the vocabulary allows; a view at a time."""
    tokens = torch.stack([tokenizer.precompute(view_B3HW) for view_B3HW in views_BA3HW.unbind(1)], dim=1)
    kind = np.float32 if tokenizer.vocab_size is None else np.min_scalar_type(tokenizer.vocab_size - 1)
    return tokens.cpu().numpy().astype(kind, copy=False)


def extract(settings: ExtractSettings) -> None:
    """Write all tokens that are not there yet, and the manifest when none is missing."""
    allow_tf32(settings.tf32)
    device = dist.get_device()
    folder = Path(settings.cached_path)
    path = fetch(settings.vae_ckpt)
    state, config = tokenizer_weights(load_file(path))
    tokenizer = build_tokenizer(FAMILIES[settings.model].tokenizer, state, str(path), device, **config)
    tokenizer.map_size(settings.image_size, settings.image_size)
    crop_range = settings.crop_range if settings.ten_crop else 0.
    images = open_split(settings.data_path, settings.split,
                        partial(crop_views, size=settings.image_size, crop_range=crop_range),
                        exif=settings.exif)
    names = image_names(images, Path(settings.data_path) / settings.split)
    description = dict(
        tokenizer=weights_digest(tokenizer.state_dict()), image_size=settings.image_size, count=len(images),
        crop_range=crop_range, layout=settings.layout, split=settings.split, exif=settings.exif,
        classes=list(images.classes), images=hashlib.sha256('\n'.join(names).encode()).hexdigest())
    dist.require_equal(description, 'what is extracted', 'every node must see the same files')
    writer = open_writer(settings, folder, names, tokenizer, device)
    with lock_folder(folder) if dist.is_master() else nullcontext():
        if dist.is_master():
            claim(folder, description, dict(ckpt=str(path), data_path=settings.data_path))
            writer.create()
        dist.barrier()
        missing = writer.open()
        dist.barrier()  # every rank has seen the same images
        begin, end = (len(missing) * (dist.get_rank() + i) // dist.get_world_size() for i in (0, 1))
        encode(settings, tokenizer, writer, images, missing[begin:end])
        dist.barrier()
        if dist.is_master():
            missing = writer.open()
            if missing:
                raise ValueError(f'expected tokens of all {len(images)} images in {folder}, {len(missing)} '
                                 'are missing: run the same command again')
            finish(folder, read_note(folder / BEGUN), images.targets)
        dist.barrier()


def encode(settings: ExtractSettings, tokenizer: Tokenizer, writer: PackedWriter | FilesWriter,
           images: Dataset, mine: list[int]) -> None:
    """Store the tokens of these images."""
    device = next(tokenizer.parameters()).device
    loader = DataLoader(Subset(images, mine), max(1, settings.batch_size // settings.num_views),
                        num_workers=settings.workers, pin_memory=device.type == 'cuda')
    done = 0
    with torch.inference_mode(), progress_bar(len(mine), settings.cached_path) as bar:
        for views_BA3HW, _ in loader:
            index_B = mine[done:done + len(views_BA3HW)]
            writer.put(index_B, tokens_of(tokenizer, views_BA3HW.to(device, non_blocking=True)))
            done += len(index_B)
            bar.update(len(index_B))
    writer.flush()


def open_writer(settings: ExtractSettings, folder: Path, names: list[str], tokenizer: Tokenizer,
                device: torch.device) -> PackedWriter | FilesWriter:
    """Where the tokens go; the shape of those of an image is that of a black one."""
    if settings.layout == 'files':
        return FilesWriter(folder, names)
    side = settings.image_size
    example = tokens_of(tokenizer, torch.zeros(1, 1, 3, side, side, device=device))
    return PackedWriter(folder, len(names), (settings.num_views, *example.shape[2:]), example.dtype)


def import_codes(settings: ExtractSettings) -> None:
    """Pack published codes, of which nobody knows the tokenizer and the names of the classes."""
    files = CodeFiles(Path(settings.import_codes), settings.image_size)
    folder = Path(settings.cached_path)
    description = dict(tokenizer=None, image_size=settings.image_size, count=files.count,
                       import_codes=str(Path(settings.import_codes).resolve()))
    with lock_folder(folder), progress_bar(files.count, str(folder)) as bar:
        if (folder / MANIFEST).is_file():
            raise ValueError(f'{folder} holds a complete cache: pass another folder')
        claim(folder, description, {})
        writer = None
        labels = []
        for index, (codes_AL, label) in enumerate(files):
            if writer is None:
                writer = PackedWriter(folder, files.count, codes_AL.shape, np.uint16)
                writer.create()
                writer.open()
            low = codes_AL.min(initial=0)
            high = codes_AL.max(initial=0)
            square = codes_AL.ndim == 2 and math.isqrt(codes_AL.shape[1]) ** 2 == codes_AL.shape[1]
            if codes_AL.shape != writer.shape or not square or low < 0 or high >= 2 ** 16 or label < 0:
                raise ValueError(f'expected views of a square map, {writer.shape}, codes in 0..65,535, and '
                                 f'a label as {index}.npy in {files.codes}, got {codes_AL.shape} of '
                                 f'{low}..{high} and {label}: extract it again')
            writer.put([index], codes_AL[None])
            labels.append(label)
            bar.update(1)
        writer.flush()
        check_labels(labels, str(files.labels))
        classes = [str(label) for label in range(max(labels) + 1)]
        finish(folder, read_note(folder / BEGUN) | dict(classes=classes), labels)


def finish(folder: Path, description: dict[str, Any], labels: list[int]) -> None:
    """Mark a cache as complete."""
    write_labels(folder, labels)
    write_note(folder / MANIFEST, description)
    logger.info('the tokens of %d images are in %s', len(labels), folder)


def main() -> None:
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
