"""Checkpoints of a training: written atomically, kept in pairs, looked through for the newest usable one.

`utils.tensor_files` writes and reads single files of tensors, `utils.files` files of any kind.
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

__all__ = ['Newest', 'UnusableFile', 'atomic_path', 'first_not_finite', 'kind_of_weights', 'load_file',
           'load_on_all_ranks', 'load_with_digest', 'lock_folder', 'model_weights', 'newest_checkpoint',
           'remove_leftovers', 'require_finite', 'save_file', 'set_aside', 'tokenizer_weights',
           'write_checkpoint']

logger = logging.getLogger(__name__)
MASKS = ('attn_bias_for_masking', 'mask')  # last part of the names of buffers that hold -inf
PREFIXES = ('module.', '_orig_mod.', 'model.')  # of DistributedDataParallel, torch.compile and Lightning
COUNTER = 'n_averaged'  # a key of torch's AveragedModel beside its weights, whose keys begin with `module.`


# ---------------------------------------------------------------------------------------------- writing
def require_finite(state: dict[str, Any]) -> None:
    """Make sure that a checkpoint of nan never replaces a good one: no start could continue from it.

    Args:
        state: what the file is to hold; its entry `trainer` is looked through.
    Raises:
        ValueError: a tensor holds nan or an infinite number.
    """
    name = first_not_finite(state.get('trainer', {}), 'trainer')
    if name is not None:
        raise ValueError(f'{name} holds nan or infinite numbers: the checkpoint is not saved, so that those '
                         'before it stay; lower the learning rate and run the same command again to go on '
                         'from the last one')


def write_checkpoint(state: dict[str, Any], folder: str | os.PathLike, prefix: str, is_best: bool = False,
                     keep_newest: int = 2, kept_step: int | None = None) -> None:
    """Write `<prefix>-last.pth`; the files before it are kept as `-prev`, `-prev2` and so on.

    `-best` appears first: a kill in between leaves an older `-last`, whose continuation writes both again.

    Args:
        state: what the file holds.
        folder: where the files lie.
        prefix: begins the names of the files.
        is_best: whether this is the best checkpoint so far, which gets the name `-best`, too.
        keep_newest: so many of the newest checkpoints are kept; older ones are removed.
        kept_step: the checkpoint is kept for good as `-step<number>`, with eight digits; None does not keep
            it.
    Raises:
        OSError: the disk is full or not writable; every older file is intact.
    """
    folder = Path(folder)
    last = folder / f'{prefix}-last.pth'
    best = folder / f'{prefix}-best.pth'
    try:
        with atomic_path(last) as temporary:
            write_signed(state, temporary)
            if is_best:
                link_or_copy(temporary, best)
            if kept_step is not None:
                link_or_copy(temporary, folder / f'{prefix}-step{kept_step:08d}.pth')
            _make_room(last, prefix, keep_newest)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
        older = '; the previous checkpoint is intact' if last.exists() else ''
        raise OSError(f'could not save a checkpoint in {str(folder)!r} ({error}): free some space and run '
                      f'the same command again{older}') from error


def _make_room(last: Path, prefix: str, keep_newest: int) -> None:
    """Let every checkpoint before the newest one move one name back, and remove those that are too old.

    `last` itself keeps its name, too, until the new file takes it.
    """
    if not last.exists():
        return
    older = {age: path for path in last.parent.glob(f'{prefix}-prev*.pth') if (age := _steps_back(path))}
    for age in sorted(older, reverse=True):
        if age + 1 >= keep_newest:
            older[age].unlink()
        else:
            older[age].replace(last.with_name(f'{prefix}-prev{age + 1}.pth'))
    if keep_newest > 1:
        link_or_copy(last, last.with_name(f'{prefix}-prev.pth'))


def _steps_back(path: Path) -> int:
    """How many saves a file lies before the newest one: 1 for `-prev`, 2 for `-prev2`, 0 for other names."""
    match = re.search(r'-prev(\d*)$', path.stem)
    return int(match[1] or 1) if match else 0


def remove_leftovers(folder: str | os.PathLike, prefix: str) -> None:
    """Remove the unfinished files of saves that were killed; call it while holding the folder's lock."""
    for path in Path(folder).glob(f'.{prefix}*.tmp'):
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a file that is in the way to `<name>.damaged`, or with a number if that name is taken.

    Returns:
        The new path.
    """
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

    Plain numbers count as well. Waits for each device once.

    Args:
        name: of the tree itself.
    """
    found: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}  # (dotted name, tensor) by device
    for place, value in _leaves(tree, name):
        if isinstance(value, float) and not math.isfinite(value):
            return place
        is_mask = place.rpartition('.')[2] in MASKS
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() and not is_mask:
            found.setdefault(value.device, []).append((place, value))
    for tensors in found.values():
        # The extremes of a tensor are finite only where all of it is, and need no memory.
        extremes = torch.stack([torch.stack(value.aminmax()).float() for _, value in tensors])
        are_finite = extremes.isfinite().all(1).tolist()
        for (place, _), is_finite in zip(tensors, are_finite, strict=True):
            if not is_finite:
                return place
    return None


def _leaves(tree: Any, name: str) -> Iterable[tuple[str, Any]]:
    """(dotted name, value) of everything in nested dicts and lists that is neither of them."""
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
            file system refuses to read a file, which says nothing about its content.
    """
    try:
        paths = list(Path(folder).iterdir())
    except FileNotFoundError:
        paths = []
    except OSError as error:
        raise ValueError(f'cannot look for checkpoints in {str(folder)!r} ({error.strerror or error}): check '
                         'the disk, the network and the permissions, and run the same command '
                         'again') from None
    left_out = set(without)
    found = [path for path in paths if fnmatch.fnmatch(path.name, pattern) and path not in left_out]
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


def _age(path: Path) -> tuple[bool, bool, int, int]:
    """A key by which the newest checkpoint is the last one.

    Names come before times, since the files of a copied folder have other times.
    """
    try:
        changed = path.lstat().st_mtime_ns
    except OSError:
        changed = 0
    back = _steps_back(path)
    kept = re.search(r'-step(\d+)$', path.stem)
    if back:
        return False, True, -back, changed
    return path.stem.endswith('-last'), False, int(kept[1]) if kept else -1, changed


# ---------------------------------------------------------------------------------------------- weights
def without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """Weights whose keys lose the prefixes that all of them share, such as `module.` or `_orig_mod.`."""
    while state and all(isinstance(key, str) for key in state):
        weights = {key: value for key, value in state.items() if key != COUNTER}
        if COUNTER in state and weights and all(key.startswith('module.') for key in weights):
            state = weights
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            if not any('_orig_mod.' in key for key in state):
                return state
            # Where a part of a model was compiled, the prefix is in the middle of its keys.
            inner = {re.sub(r'(^|\.)_orig_mod\.', r'\1', key): value for key, value in state.items()}
            return inner if len(inner) == len(state) else state
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def model_weights(checkpoint: dict[str, Any], weights: str = 'ema') -> dict[str, torch.Tensor]:
    """The flat weights of a generator: from a checkpoint of ours or upstream's, or from a released file.

    Args:
        weights: 'ema' for averaged weights where the file has them, 'raw' for those of the last step, or one
            of several averages by its name, such as 'ema_0.9999'.
    Raises:
        ValueError: the file has no such average.
    """
    trainer = checkpoint.get('trainer', {})
    if weights not in ('ema', 'raw'):
        return _named_average(trainer, 'var_', weights)
    places = [(trainer, 'var_wo_ddp'), (checkpoint, 'model'), (checkpoint, 'module'),
              (checkpoint, 'state_dict')]
    if weights == 'ema':
        places = [(trainer, 'var_ema'), (checkpoint, 'model_ema'), (checkpoint, 'ema'), *places]
    for holder, key in places:
        if _holds_weights(holder, key):
            return without_prefix(holder[key])
    return without_prefix(checkpoint)


def kind_of_weights(checkpoint: dict[str, Any], weights: str, is_generator: bool) -> str:
    """The kind of the weights that `model_weights` or `tokenizer_weights` takes: 'raw' without an average.

    Args:
        weights: what is asked for, see `model_weights`.
        is_generator: whether `model_weights` reads the file.
    """
    averages = {'var_ema', 'model_ema', 'ema'} if is_generator else {'vae_ema', 'ema'}
    has_average = averages & (checkpoint.keys() | checkpoint.get('trainer', {}).keys())
    return 'raw' if weights == 'ema' and not has_average else weights


def _named_average(trainer: dict[str, Any], prefix: str, name: str) -> dict[str, torch.Tensor]:
    """The weights under the key `prefix + name` of a checkpoint."""
    if _holds_weights(trainer, prefix + name):
        return without_prefix(trainer[prefix + name])
    found = [key.removeprefix(prefix) for key in trainer if key.startswith(f'{prefix}ema')]
    raise ValueError(f'expected weights averaged as {name}, the file holds {", ".join(found) or "none"}: '
                     'pass another --weights')


def _holds_weights(holder: dict[str, Any], key: str) -> bool:
    return isinstance(holder.get(key), dict) and bool(holder[key])


def tokenizer_weights(
    checkpoint: dict[str, Any],
    weights: str = 'ema',
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tokenizer of a checkpoint of ours (its own or a generator's) or upstream's, or of a released file.

    Args:
        weights: see `model_weights`.
    Returns:
        The flat weights, and settings of the architecture that weights do not show; {} in files of others.
    Raises:
        ValueError: the file has no such average.
    """
    trainer = checkpoint.get('trainer', {})
    trainer_config = trainer.get('config') if 'vae_wo_ddp' in trainer else trainer.get('vae_config')
    if weights not in ('ema', 'raw'):
        return _named_average(trainer, 'vae_', weights), trainer_config
    keys = ['vae_wo_ddp', 'vae_local', 'model', 'module', 'state_dict']
    if weights == 'ema':
        keys = ['vae_ema', 'ema', *keys]
    for holder, config in ((trainer, trainer_config), (checkpoint, checkpoint.get('config'))):
        for key in keys:
            if _holds_weights(holder, key):
                return without_prefix(holder[key]), config if isinstance(config, dict) else {}
    return without_prefix(checkpoint), {}
