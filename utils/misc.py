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
    state, = np.random.SeedSequence(keys).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def auto_resume(args: Any, pattern: str = 'ar-ckpt*.pth') -> tuple[list[str], int, int, dict, dict]:
    """The newest readable checkpoint in `args.local_out_dir_path`; the call of the published code.

    Returns:
        (lines for the log, epoch, iteration, state of the trainer, settings). Without a checkpoint, epoch and
        iteration are 0 and both dicts are empty.
    Raises:
        ValueError: there are checkpoints, and none of them is usable.
    """
    path, checkpoint, *_ = newest_checkpoint(args.local_out_dir_path, pattern)
    if path is None:
        return [f'no {pattern} in {args.local_out_dir_path}, starting anew'], 0, 0, {}, {}
    epoch = checkpoint['epoch']
    iteration = checkpoint['iter']
    lines = [f'resuming from {path} at epoch {epoch}, iteration {iteration}']
    return lines, epoch, iteration, checkpoint['trainer'], checkpoint['args']


# ---------------------------------------------------------------------------------------------- precision
def _newer_settings() -> list[Any]:
    """The objects of torch.backends that have an `fp32_precision`, since torch 2.9; [] before.

    The general ones come before the special ones: the setting of one kind of product falls back on that of
    its library, and that on the setting of all products. The two older settings remain beside them, one for
    all products and a flag of cudnn. Reading these raises an error while newer settings contradict them, so
    all settings are always changed together.
    """
    backends = torch.backends
    if not hasattr(backends.cuda.matmul, 'fp32_precision'):
        return []
    return [backends, backends.cudnn, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
            backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]


@functools.cache
def _spend_deprecation_warnings() -> None:
    """Use each of the older settings once, since some releases of torch warn at their first use.

    This also sets them, so call it while the newer settings are cleared or about to be set.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with suppress(RuntimeError):  # the settings contradict each other at this point
            torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())
        with suppress(RuntimeError):
            torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32


def allow_tf32(allowed: bool) -> None:
    """Choose whether float32 products and convolutions on CUDA may use TF32; the CPU never does."""
    cudnn = torch.backends.cudnn
    newer = _newer_settings()
    if newer:
        _spend_deprecation_warnings()
    torch.set_float32_matmul_precision('high' if allowed and torch.cuda.is_available() else 'highest')
    cudnn.allow_tf32 = allowed
    # Explicit values, which a more general setting does not change.
    if newer:
        cudnn.conv.fp32_precision = 'tf32' if allowed else 'ieee'
        cudnn.rnn.fp32_precision = 'tf32' if allowed else 'ieee'


@contextmanager
def full_precision() -> Iterator[None]:
    """A context without TF32 and without float16 sums in products and convolutions.

    Afterwards all settings are as the caller has set them.
    """
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    newer = _newer_settings()
    before = []
    for setting in newer:
        before.append(setting.fp32_precision)
        setting.fp32_precision = 'none'  # a setting that falls back on this one then shows its own value
    if newer:
        _spend_deprecation_warnings()
    older = torch.get_float32_matmul_precision()
    try:
        older_flag = cudnn.allow_tf32
    except RuntimeError:
        # No newer setting allows TF32 at this point, so a flag that contradicts them is True.
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

    This is the call of the published code: nothing is shuffled or converted, and there are no labels. For
    these see `pack_folder`.

    Args:
        num_images: the number of files that there must be; FID evaluators expect 50,000.
    Returns:
        Path of the uncompressed file, `<sample_folder>.npz`.
    Raises:
        ValueError: the number of files is another one, or images differ in size or are not RGB of 8 bits.
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
