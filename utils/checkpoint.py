"""Checkpoints of a training: written atomically, kept in pairs, looked through for the newest usable one.

How a file of tensors is written and read is in `utils.tensor_files`, what holds for files of any kind in
`utils.files`.
"""
import fnmatch
import logging
import math
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.files import atomic_path, link_or_copy, lock_folder, sync_folder
from utils.tensor_files import (
    UnusableFile,
    load_file,
    load_on_all_ranks,
    load_with_digest,
    save_file,
    write_signed,
)

__all__ = ['Newest', 'UnusableFile', 'atomic_path', 'first_not_finite', 'load_file', 'load_on_all_ranks',
           'load_with_digest', 'lock_folder', 'model_weights', 'newest_checkpoint', 'remove_leftovers',
           'save_checkpoint', 'save_file', 'set_aside', 'tokenizer_weights']

logger = logging.getLogger(__name__)
MASKS = ('attn_bias_for_masking', 'mask')  # last part of the names of buffers that hold -inf
PREFIXES = ('module.', '_orig_mod.', 'model.')  # of DistributedDataParallel, torch.compile and Lightning
COUNTER = 'n_averaged'  # what torch's AveragedModel keeps beside the weights, whose keys begin with `module.`


# ---------------------------------------------------------------------------------------------- writing
def save_checkpoint(state: dict[str, Any], folder: str | os.PathLike, prefix: str,
                    is_best: bool = False) -> None:
    """Write `<prefix>-last.pth`, also as `-best` if `is_best`; the file it replaces stays as `-prev`.

    `-best` appears first: a kill in between leaves an older `-last`, whose continuation writes both again.

    Raises:
        OSError: the disk is full or not writable; every older file is intact.
        ValueError: a tensor of the state holds nan or an infinite number; nothing is written.
    """
    name = first_not_finite(state.get('trainer', {}), 'trainer')
    if name is not None:
        raise ValueError(f'{name} holds nan or infinite numbers: the checkpoint is not saved, so that those '
                         'before it stay; lower the learning rate and run the same command again to go on '
                         'from the last one')
    folder = Path(folder)
    last, previous, best = (folder / f'{prefix}-{name}.pth' for name in ('last', 'prev', 'best'))
    try:
        with atomic_path(last) as temporary:
            write_signed(state, temporary)
            if is_best:
                link_or_copy(temporary, best)
            if last.exists():  # both names exist until the new file takes `last`
                link_or_copy(last, previous)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
        older = '; the previous checkpoint is intact' if last.exists() else ''
        raise OSError(f'could not save a checkpoint in {str(folder)!r} ({error}): free some space and run '
                      f'the same command again{older}') from error


def remove_leftovers(folder: str | os.PathLike, prefix: str) -> None:
    """Remove the unfinished files of saves that were killed; call it while holding the folder's lock."""
    for path in Path(folder).glob(f'.{prefix}*.tmp'):
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a file that is in the way to `<name>.damaged`, with a number where that is taken."""
    target = path.with_name(f'{path.name}.damaged')
    number = 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f'{path.name}.damaged{number}')
    path.rename(target)
    return target


@torch.no_grad()
def first_not_finite(tree: Any, name: str = '') -> str | None:
    """Dotted name of the first tensor in nested dicts and lists that holds nan or an infinite number.

    Plain numbers count as well, but for the scores of a validation, which may be nan. Waits for a device
    once.

    Args:
        name: of the tree itself.
    """
    found: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}  # with their names, by device
    for place, value in _leaves(tree, name):
        if isinstance(value, float) and not math.isfinite(value):
            return place
        is_mask = place.rpartition('.')[2] in MASKS
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() and not is_mask:
            found.setdefault(value.device, []).append((place, value))
    for tensors in found.values():
        # the smallest and the largest number take in every nan, and need no memory
        extremes = torch.stack([torch.stack(value.aminmax()).float() for _, value in tensors])
        for (place, _), is_finite in zip(tensors, extremes.isfinite().all(1).tolist(), strict=True):
            if not is_finite:
                return place
    return None


def _leaves(tree: Any, name: str) -> Iterable[tuple[str, Any]]:
    """Everything in nested dicts and lists that is neither, with its dotted name."""
    if isinstance(tree, dict):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        yield name, tree
        return
    for key, value in items:
        yield from _leaves(value, f'{name}.{key}' if name else str(key))


# ---------------------------------------------------------------------------------------------- reading
class Newest(NamedTuple):
    """The newest usable checkpoint of a folder."""
    path: Path | None            # None: the folder holds no checkpoint
    content: dict[str, Any]
    digest: str                  # SHA-256 of the file
    unusable: tuple[Path, ...]   # newer files that could not be used, newest first


def newest_checkpoint(folder: str | os.PathLike, pattern: str, without: Collection[Path] = ()) -> Newest:
    """The newest usable checkpoint of a folder; damaged ones are named in the log and skipped.

    Args:
        pattern: of the names of checkpoints.
        without: files that are left out, as if they were not there.
    Raises:
        ValueError: there are checkpoints, and none can be used: starting anew would hide the loss. Or the
            file system refuses to read one, which says nothing of what it holds.
    """
    try:
        paths = list(Path(folder).iterdir())
    except FileNotFoundError:
        paths = []
    except OSError as error:
        raise ValueError(f'cannot look for checkpoints in {str(folder)!r} ({error.strerror or error}): check '
                         'the disk, the network and the permissions, and run the same command '
                         'again') from None
    found = [path for path in paths if fnmatch.fnmatch(path.name, pattern) and path not in set(without)]
    files = sorted(found, reverse=True, key=_age)
    unusable: list[Path] = []
    for path in files:
        try:
            content, digest = load_with_digest(path)
            missing = [name for name in ('epoch', 'iter', 'trainer') if name not in content]
            if missing:
                raise UnusableFile(f'{str(path)!r} is no checkpoint of a training, it has no '
                                   f'{" and no ".join(missing)}')
            return Newest(path, content, digest, tuple(unusable))
        except (UnusableFile, FileNotFoundError) as error:
            logger.warning('%s; falling back to the next older checkpoint', error)
            unusable.append(path)
    if files:
        raise ValueError(f'none of the {len(files)} checkpoints in {str(folder)!r} can be read: '
                         'restore one, or move them away to start anew')
    return Newest(None, {}, '', ())


def _age(path: Path) -> tuple[bool, bool, int]:
    """What the newest checkpoint has most of: its name where it tells, as a copied folder has other times."""
    try:
        changed = path.lstat().st_mtime_ns
    except OSError:
        changed = 0
    return path.stem.endswith('-last'), path.stem.endswith('-prev'), changed


# ---------------------------------------------------------------------------------------------- weights
def without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """Weights whose keys lose the prefixes that all of them have, such as `module.` or `_orig_mod.`."""
    while state and all(isinstance(key, str) for key in state):
        weights = {key: value for key, value in state.items() if key != COUNTER}
        if COUNTER in state and weights and all(key.startswith('module.') for key in weights):
            state = weights
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            if not any('_orig_mod.' in key for key in state):
                return state
            # torch.compile of a part puts its prefix into the middle of the keys
            inner = {re.sub(r'(^|\.)_orig_mod\.', r'\1', key): value for key, value in state.items()}
            return inner if len(inner) == len(state) else state
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def model_weights(checkpoint: dict[str, Any], prefer_ema: bool = True) -> dict[str, torch.Tensor]:
    """The flat weights of a generator: of our checkpoints, of upstream's, or of a released file.

    Args:
        prefer_ema: take averaged weights where there are any.
    """
    trainer = checkpoint.get('trainer', {})
    averaged = ((trainer, 'var_ema'), (checkpoint, 'model_ema'), (checkpoint, 'ema')) if prefer_ema else ()
    plain = (trainer, 'var_wo_ddp'), *((checkpoint, key) for key in ('model', 'module', 'state_dict'))
    found = next((holder[key] for holder, key in (*averaged, *plain)
                  if isinstance(holder.get(key), dict) and holder[key]), checkpoint)
    return without_prefix(found)


def tokenizer_weights(checkpoint: dict[str, Any], prefer_ema: bool = True,
                      ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tokenizer of a checkpoint of ours (its own or a generator's), of upstream's, or of a released file.

    Args:
        prefer_ema: take averaged weights where there are any.
    Returns:
        (flat weights, what they do not tell of the architecture; empty in files of others).
    """
    trainer = checkpoint.get('trainer', {})
    of_trainer = trainer.get('config') if 'vae_wo_ddp' in trainer else trainer.get('vae_config')
    keys = ('vae_wo_ddp', 'vae_local', 'model', 'module', 'state_dict')
    if prefer_ema:
        keys = ('vae_ema', 'ema', *keys)
    for holder, config in ((trainer, of_trainer), (checkpoint, checkpoint.get('config'))):
        for key in keys:
            if isinstance(holder.get(key), dict) and holder[key]:
                return without_prefix(holder[key]), config if isinstance(config, dict) else {}
    return without_prefix(checkpoint), {}
