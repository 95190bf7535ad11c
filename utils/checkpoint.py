"""Checkpoints: written atomically, kept in pairs, read without executing anything."""
import fcntl
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

logger = logging.getLogger(__name__)


@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `target` that replaces it when the block ends well, and vanishes otherwise."""
    target = Path(target)
    temporary = target.with_name(f'.{target.name}.tmp')  # a killed run's leftover is overwritten by the next
    try:
        yield temporary
        with temporary.open('rb') as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def lock_folder(folder: str | os.PathLike) -> IO:
    """Claim an output folder for this process, until the returned file is closed or the process ends.

    Raises:
        ValueError: another process on this file system holds it, or it cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = (Path(folder) / '.lock').open('w')
    except OSError as error:
        raise ValueError(f'cannot write to the output folder {folder} ({error.strerror}): '
                         'pass another one, or change its permissions') from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'{folder} is in use by another run: wait for it, stop all its processes, '
                         'or pass another output folder') from None
    return lock


def save_checkpoint(state: dict[str, Any], folder: str | os.PathLike, prefix: str,
                    is_best: bool = False) -> None:
    """Write `<prefix>-last.pth`, copied to `-best` if `is_best`; the file it replaces stays as `-prev`.

    Raises:
        OSError: the disk is full or not writable; every older file is intact.
    """
    folder = Path(folder)
    last, previous, best = (folder / f'{prefix}-{name}.pth' for name in ('last', 'prev', 'best'))
    try:
        with atomic_path(last) as temporary:
            torch.save(state, temporary)
            if last.exists():  # both names exist until the new file takes `last`
                with atomic_path(previous) as second_name:
                    second_name.unlink(missing_ok=True)
                    try:
                        os.link(last, second_name)
                    except OSError:  # a file system without hard links
                        shutil.copyfile(last, second_name)
        if is_best:
            with atomic_path(best) as temporary:
                shutil.copy2(last, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
        raise OSError(f'could not save a checkpoint in {folder} ({error}): free some space and run the '
                      'same command again; the previous checkpoint is intact') from error


def load_file(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint of torch or safetensors on the CPU.

    Raises:
        ValueError: the file is truncated, corrupt or holds other objects than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'expected a checkpoint file, found nothing at {path}: check the path')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file as load_safetensors
            return load_safetensors(path)
        # mapped, so that the ranks of a node share one copy in memory; files older than torch 1.6 cannot be
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except ImportError:
        raise
    except Exception as error:  # foreign bytes make the unpickler raise anything
        if 'argparse.Namespace' in str(error):
            raise ValueError(f'{path} holds a pickled argparse.Namespace beside its weights, and pickled '
                             "objects are not read: if you trust it, save the dict without 'args', once, "
                             'with torch.load(path, weights_only=False)') from None
        raise ValueError(f'{path} cannot be read: the file is truncated or no checkpoint') from error
    if not isinstance(content, dict) or not isinstance(content.get('trainer', {}), dict):
        raise ValueError(f'expected a checkpoint or a state dict in {path}, got something else: check it')
    return content


def model_weights(checkpoint: dict[str, Any], prefer_ema: bool = True) -> dict[str, torch.Tensor]:
    """The flat weights of a generator: of our checkpoints, of upstream's, or of a released file.

    Args:
        prefer_ema: take averaged weights where there are any.
    """
    trainer = checkpoint.get('trainer', {})
    averaged = ((trainer, 'var_ema'), (checkpoint, 'model_ema'), (checkpoint, 'ema')) if prefer_ema else ()
    plain = (trainer, 'var_wo_ddp'), *((checkpoint, key) for key in ('model', 'module', 'state_dict'))
    return next((holder[key] for holder, key in (*averaged, *plain) if holder.get(key)), checkpoint)


def tokenizer_weights(checkpoint: dict[str, Any], prefer_ema: bool = True,
                      ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tokenizer of a checkpoint of ours (its own or a generator's), of upstream's, or of a released file.

    Args:
        prefer_ema: take averaged weights where there are any.
    Returns:
        (flat weights, what they do not tell of the architecture; empty in files of others).
    """
    trainer = checkpoint.get('trainer', {})
    for holder, config in ((trainer, trainer.get('config') if 'vae_wo_ddp' in trainer
                            else trainer.get('vae_config')), (checkpoint, checkpoint.get('config'))):
        for key in ('vae_ema', 'ema') * prefer_ema + ('vae_wo_ddp', 'vae_local', 'model', 'state_dict'):
            if holder.get(key):
                return holder[key], config or {}
    return checkpoint, {}


def newest_checkpoint(folder: str | os.PathLike, pattern: str) -> tuple[Path | None, dict[str, Any]]:
    """The newest readable checkpoint of a folder; unreadable ones are named in the log and skipped.

    Returns:
        (path, checkpoint), or (None, {}) where the folder holds none.
    Raises:
        ValueError: there are checkpoints, and none can be read: starting anew would hide the loss.
    """
    def age(path: Path) -> tuple:  # by name where it tells: a copied folder has other times
        return path.stem.endswith('-last'), path.stem.endswith('-prev'), path.stat().st_mtime_ns
    files = sorted(Path(folder).glob(pattern), reverse=True, key=age)
    for path in files:
        try:
            return path, load_file(path)
        except ValueError as error:
            logger.warning('%s; falling back to the next older checkpoint', error)
    if files:
        raise ValueError(f'none of the {len(files)} checkpoints in {folder} can be read: '
                         'restore one, or move them away to start anew')
    return None, {}
