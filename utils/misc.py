"""Seeding, float32 precision, resume in upstream's form, and the npz packer of sample folders."""
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.checkpoint import atomic_path, newest_checkpoint

__all__ = ['allow_tf32', 'auto_resume', 'create_npz_from_sample_folder', 'mix_seed', 'seed_everything']


def mix_seed(*keys: int) -> int:
    """A 63-bit seed that depends on all keys (non-negative integers) and on their order."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def auto_resume(args: Any, pattern: str = 'ar-ckpt*.pth') -> tuple[list[str], int, int, dict, dict]:
    """The newest readable checkpoint in `args.local_out_dir_path`, upstream's call.

    Returns:
        (lines for the log, epoch, iteration, state of the trainer, settings); zeros and empty without one.
    """
    path, checkpoint = newest_checkpoint(args.local_out_dir_path, pattern)
    if path is None:
        return [f'no {pattern} in {args.local_out_dir_path}, starting anew'], 0, 0, {}, {}
    epoch, iteration = checkpoint['epoch'], checkpoint['iter']
    return ([f'resuming from {path} at epoch {epoch}, iteration {iteration}'], epoch, iteration,
            checkpoint['trainer'], checkpoint['args'])


def allow_tf32(allowed: bool) -> None:
    """Let float32 products and convolutions on CUDA use TF32, or not; the CPU never does."""
    torch.set_float32_matmul_precision('high' if allowed and torch.cuda.is_available() else 'highest')
    torch.backends.cudnn.allow_tf32 = allowed


def _open_png(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except (OSError, SyntaxError) as error:
        raise ValueError(f'cannot read {path} ({error}): remove the file and sample again') from None


def create_npz_from_sample_folder(sample_folder: str, num_images: int = 50_000) -> str:
    """Pack the PNG files directly in a folder as uint8 (N, H, W, 3) under `arr_0`, in the order of names.

    Images are streamed, so memory holds one at a time.

    Args:
        num_images: how many files there must be; 50,000 is what FID evaluators expect.
    Returns:
        Path of the uncompressed file, `<sample_folder>.npz`.
    Raises:
        ValueError: wrong number of files, or images that differ in size or are not RGB of 8 bits.
    """
    folder = Path(sample_folder)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == '.png')
    if len(files) != num_images:
        raise ValueError(f'expected {num_images} PNG files in {folder}, got {len(files)}: '
                         f'sample the missing ones or remove the surplus, or pass num_images={len(files)}')
    with _open_png(files[0]) as first:
        size = first.size
    target = folder.with_name(f'{folder.name}.npz')
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive, \
            archive.open('arr_0.npy', 'w', force_zip64=True) as stream:
        header = dict(descr='|u1', fortran_order=False, shape=(num_images, size[1], size[0], 3))
        np.lib.format.write_array_header_1_0(stream, header)
        for path in files:
            with _open_png(path) as image:
                if image.mode != 'RGB' or image.size != size:
                    raise ValueError(f'expected 8-bit RGB images of {size[0]}x{size[1]} in {folder}, got '
                                     f'{image.mode} of {image.size[0]}x{image.size[1]} in {path.name}: '
                                     'sample into a fresh folder')
                stream.write(np.asarray(image).tobytes())
    return str(target)
