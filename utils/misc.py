"""Seeding, float32 precision, resume in upstream's form, and the npz packer of sample folders."""
import functools
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint import newest_checkpoint
from utils.image_sets import FolderImages, write_npz
from utils.log import MetricLogger, SmoothedValue, TensorboardLogger  # where the published code has them

__all__ = ['MetricLogger', 'SmoothedValue', 'TensorboardLogger', 'allow_tf32', 'auto_resume',
           'create_npz_from_sample_folder', 'full_precision', 'mix_seed', 'seed_everything']


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
    path, checkpoint, *_ = newest_checkpoint(args.local_out_dir_path, pattern)
    if path is None:
        return [f'no {pattern} in {args.local_out_dir_path}, starting anew'], 0, 0, {}, {}
    epoch = checkpoint['epoch']
    iteration = checkpoint['iter']
    return ([f'resuming from {path} at epoch {epoch}, iteration {iteration}'], epoch, iteration,
            checkpoint['trainer'], checkpoint['args'])


# ---------------------------------------------------------------------------------------------- precision
def _newer_settings() -> list[Any]:
    """Objects with an `fp32_precision` of their own, since torch 2.9, the general before the special.

    The precision of one kind of product falls back on that of its library, and that on the precision of all.
    Beside them the older settings remain, one of all products and a flag of cudnn, which raise when they are
    read while the newer ones contradict them. All are therefore always set together.
    """
    backends = torch.backends
    if not hasattr(backends.cuda.matmul, 'fp32_precision'):
        return []
    return [backends, backends.cudnn, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
            backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]


@functools.cache
def _spend_deprecation_warnings() -> None:
    """Some releases of torch warn once per process at the first use of each of the older settings.

    Call it while the newer ones are cleared or about to be set, since it sets them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with suppress(RuntimeError):  # of settings that contradict each other
            torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())
        with suppress(RuntimeError):
            torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32


def allow_tf32(allowed: bool) -> None:
    """Let float32 products and convolutions on CUDA use TF32, or not; the CPU never does."""
    cudnn = torch.backends.cudnn
    newer = _newer_settings()
    if newer:
        _spend_deprecation_warnings()
    torch.set_float32_matmul_precision('high' if allowed and torch.cuda.is_available() else 'highest')
    cudnn.allow_tf32 = allowed
    if newer:  # an explicit value, which a more general setting does not change
        cudnn.conv.fp32_precision = 'tf32' if allowed else 'ieee'
        cudnn.rnn.fp32_precision = 'tf32' if allowed else 'ieee'


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no float16 sums in products and convolutions; then all is as the caller set it."""
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    newer = _newer_settings()
    before = []
    for setting in newer:
        before.append(setting.fp32_precision)
        setting.fp32_precision = 'none'  # what falls back on it then shows what it holds itself
    if newer:
        _spend_deprecation_warnings()
    older = torch.get_float32_matmul_precision()
    try:
        older_flag = cudnn.allow_tf32
    except RuntimeError:  # nothing newer allows TF32 at this point, so the flag contradicts: it is set
        older_flag = True
    half_sums = matmul.allow_fp16_reduced_precision_reduction
    torch.set_float32_matmul_precision('highest')
    cudnn.allow_tf32 = False
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        cudnn.allow_tf32 = older_flag
        matmul.allow_fp16_reduced_precision_reduction = half_sums
        for setting, precision in zip(newer, before, strict=True):
            setting.fp32_precision = precision


def create_npz_from_sample_folder(sample_folder: str, num_images: int = 50_000) -> str:
    """Pack the PNG files directly in a folder as uint8 (N, H, W, 3) under `arr_0`, in the order of names.

    Upstream's call: nothing is shuffled or converted, and there are no labels; see `pack_folder` for these.

    Args:
        num_images: how many files there must be; 50,000 is what FID evaluators expect.
    Returns:
        Path of the uncompressed file, `<sample_folder>.npz`.
    Raises:
        ValueError: wrong number of files, or images that differ in size or are not RGB of 8 bits.
    """
    folder = Path(sample_folder)
    images = FolderImages(folder, allow_jpeg=False)
    if images.count != num_images:
        raise ValueError(f'expected {num_images} PNG files in {folder}, got {images.count}: '
                         f'sample the missing ones or remove the surplus, or pass num_images={images.count}')
    if images.warnings:
        raise ValueError(f'expected RGB images of 8 bits, got {images.warnings[0]}: '
                         'sample into a fresh folder')
    target = folder.with_name(f'{folder.name}.npz')
    write_npz(target, images.blocks(), images.count, images.height, images.width)
    return str(target)
