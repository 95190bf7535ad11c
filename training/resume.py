"""How a run is continued: which checkpoint, the same one on every rank, and whether it belongs to this run.

Global rank 0 chooses; the other ranks read the same file from their own view of the output folder. A rank
that sees another file, or none, ends the run: it would train another model, and the averaged gradients of two
models give a loss curve that looks all right.
"""
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dist
from utils.checkpoint import (
    Newest,
    first_not_finite,
    load_file,
    load_with_digest,
    newest_checkpoint,
    set_aside,
)
from utils.files import link_or_copy

logger = logging.getLogger(__name__)
NONE = Newest(None, {}, '', ())
FORMER_NAMES = {  # of settings in checkpoints of older versions
    'stride': 'patch_size',
    'images_per_step': 'batch_size',
    'images_per_rank': 'batch_per_process',
}
# Settings that stay what they were: they decide what kind of model the weights are, which parameters the
# optimizer knows, and what it minimises. Of each, the value in checkpoints that do not name it, where None is
# that of the run; and what helps.
SETTLED = dict(
    model=(None, 'correct it, or start in another output folder'),
    freeze=('', 'pass the flag as it was, or start in another output folder with --init_from'),
    objective=('mle', 'correct it, or start in another output folder with --init_from'),
)
NO_SCORE = 999.  # "best so far" before the first evaluation, as published
WAIT_SECONDS = 30  # for a shared file system to show a file that another node has just written


@dataclass
class RunState:
    """The entry `run` of a checkpoint: where the run stands, beside weights and optimizer."""
    seed: int
    steps_per_epoch: int
    best: float = NO_SCORE                 # lowest validation score so far
    best_epoch: int = -1                   # epochs ended when it was reached
    validation: dict | None = None         # metrics of the last evaluation
    epochs_ended: int = 0                  # epochs whose evaluation and line in log.txt are done
    skipped_steps: int = 0                 # steps left out, because they were not finite
    bad_images: list[str] = field(default_factory=list)  # why each could not be read
    # (first, last) steps that are never done again, since they have spoilt the weights; one pair per restore
    left_out: list[tuple[int, int]] = field(default_factory=list)

    def is_left_out(self, step: int) -> bool:
        """Whether a step, counted from the beginning of the training, is not done again."""
        return any(first <= step <= last for first, last in self.left_out)

    def take_over(self, path: Path, checkpoint: dict[str, Any], described: dict[str, Any],
                  steps: int) -> tuple[int, int]:
        """Continue the state of a checkpoint; data that have changed are named in the log.

        Args:
            path: the checkpoint, for messages.
            checkpoint: its content.
            described: number and digest of the images of this run.
            steps: `--steps` of this run.
        Returns:
            (epoch, step within it) at which the run goes on.
        Raises:
            ValueError: the checkpoint lies within an epoch, and this run has another batch size.
        """
        here = self.steps_per_epoch
        epoch, step = position_of(checkpoint)
        saved = {name: value for name, value in checkpoint.get('run', {}).items() if name in vars(self)}
        for name, value in saved.items():
            setattr(self, name, value)
        then = self.steps_per_epoch

        # Checkpoints of earlier versions and published ones do not say how many epochs have ended.
        if 'epochs_ended' not in saved:
            self.epochs_ended = epoch
            if step and steps and epoch * then + step >= steps:
                self.epochs_ended += 1
        changes = data_changes(checkpoint.get('data'), described)
        if changes:
            consequence = ''
            if step > 0:
                consequence = ('. The rest of this epoch has another order: some images come twice in it, '
                               'others not at all')
            logger.warning('the data set is not that of the checkpoint: %s%s',
                           '; '.join(changes), consequence)

        # Steps are counted in batches, so within an epoch a count means nothing for batches of another size.
        if step > 0 and then != here:
            if not changes:
                raise ValueError(f'{str(path)!r} stopped within an epoch of {then} steps, this run has '
                                 f'{here}: keep --bs and the data as they were until the epoch is complete, '
                                 'or pass another --output_dir if this is another training')
            step = min(step, here)
        self.steps_per_epoch = here
        return epoch, step


# ------------------------------------------------------------------------------ which checkpoint
def choose_checkpoint(folder: Path, pattern: str) -> Newest:
    """The checkpoint that all ranks continue from; every rank calls it.

    Newer files that are damaged are moved aside, so that the next save neither keeps them as the previous
    checkpoint nor fails because of them.

    Args:
        folder: the output folder, as this rank sees it.
        pattern: of the names of checkpoints.
    Returns:
        `NONE` if there is no checkpoint.
    Raises:
        ValueError: no file can be read, access to one is refused, or a rank does not see the chosen file.
    """
    chosen = NONE

    def choose() -> tuple[str, str, tuple[int, int]] | None:
        nonlocal chosen
        chosen = newest_finite_checkpoint(folder, pattern)
        if chosen.path is None:
            return None
        for path in chosen.unusable:
            logger.warning('%r is moved to %r', str(path), set_aside(path).name)
        return chosen.path.name, chosen.digest, position_of(chosen.content)

    told = dist.from_master(choose)
    if told is None:
        return NONE

    # The other ranks look for the file that rank 0 names, and all give up together if one does not find it.
    name, digest, position = told
    failure = None
    if not dist.is_master():
        try:
            chosen = read_as_told(folder / name, digest, position)
        except ValueError as error:
            failure = error
    dist.raise_together(failure)
    return chosen


def position_of(content: dict[str, Any]) -> tuple[int, int]:
    """(epoch, optimizer step within it) at which a checkpoint continues."""
    return content['epoch'], content['iter']


def newest_finite_checkpoint(folder: Path, pattern: str) -> Newest:
    """The newest usable checkpoint whose weights and moments are finite; see `newest_checkpoint`.

    Raises:
        ValueError: there are checkpoints, and none of them is usable.
    """
    rejected: list[Path] = []
    while True:
        found = newest_checkpoint(folder, pattern, without=rejected)
        if found.path is None:
            if rejected:
                raise ValueError(f'all {len(rejected)} checkpoints in {str(folder)!r} hold nan or infinite '
                                 'numbers: begin in another output folder with a lower learning rate')
            return found
        name = first_not_finite(found.content['trainer'], 'trainer')
        if name is None:
            return found._replace(unusable=(*rejected, *found.unusable))
        logger.warning('%r holds nan or infinite numbers (%s); falling back to the next older checkpoint',
                       str(found.path), name)
        rejected += [*found.unusable, found.path]


def read_as_told(path: Path, digest: str, position: tuple[int, int]) -> Newest:
    """The file that rank 0 has chosen, as this rank sees it; waits a while for it to appear.

    The first process of a node compares the digest, the other ones only epoch and step of the checkpoint.

    Args:
        digest: SHA-256 of the file on rank 0.
        position: (epoch, step within it) of the checkpoint on rank 0.
    Raises:
        ValueError: the file is not there, or is another one.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            if dist.is_local_master():
                content, found_digest = load_with_digest(path)
            else:
                content = load_file(path, verify=False)
                found_digest = digest
            if (found_digest, position_of(content)) == (digest, position):
                return Newest(path, content, digest, ())
            reason = (f'{str(path)!r} is another file than the one that rank 0 continues from '
                      f'(SHA-256 {found_digest[:12]} and {digest[:12]})')
        except (OSError, ValueError, KeyError) as error:
            reason = f'{str(path)!r}, which rank 0 continues from, cannot be read here ({error})'
        if time.monotonic() > deadline:
            raise ValueError(f'{reason}: the output folder must lie on a file system that all nodes share')
        time.sleep(1)


def go_back_one_checkpoint(path: Path, prefix: str) -> None:
    """Move away a checkpoint after which no step was finite, so that the one before it is the newest.

    The only checkpoint of a folder stays. Every rank calls it.
    """
    dist.barrier()
    if dist.is_master():
        aside = set_aside(path)
        logger.warning('not one step after %r was finite: it is moved to %r, the checkpoint before it is '
                       'next, this once', str(path), aside.name)
        if not list(path.parent.glob(f'{prefix}*.pth')):
            aside.rename(path)
    dist.barrier()


# ------------------------------------------------------------------------------ of this run or of another
def check_settings(path: Path, content: dict[str, Any], config: Any) -> None:
    """Make sure that a checkpoint is of the same training, as far as `SETTLED` says.

    Args:
        path: the checkpoint, for the message.
        content: its content.
        config: of this run.
    Raises:
        ValueError: one of these settings was another one.
    """
    saved = content.get('args') or {}
    for name, (former, advice) in SETTLED.items():
        here = getattr(config, name)
        trained = saved.get(name, here if former is None else former)
        if trained != here:
            before = f'with --{name}={trained}' if trained else f'without --{name}'
            now = f'--{name}={here}' if here else 'none'
            raise ValueError(f'{str(path)!r} was trained {before}, got {now}: {advice}')


def check_classes(path: Path, content: dict[str, Any], classes: list[str], data_path: str) -> None:
    """Make sure that every label still means the class that it meant.

    Args:
        path: the checkpoint, for the message.
        content: its content.
        classes: names of the classes of this run, by label.
        data_path: of this run, for the message.
    Raises:
        ValueError: a class has another name, or another place in the order.
    """
    saved = content.get('classes')
    # Published checkpoints do not name their classes.
    if saved is None or list(saved) == list(classes):
        return
    trained_on = (content.get('args') or {}).get('data_path', '')
    place = f' (trained on {trained_on!r})' if trained_on not in ('', data_path) else ''
    raise ValueError(f'{str(path)!r}{place} has {first_difference(saved, classes)}: restore the folders of '
                     'the classes to go on, or begin in another --output_dir (there --init_from takes over '
                     'the weights by the names of the classes)')


def first_difference(saved: list[str], here: list[str]) -> str:
    """The first class in which two lists of names differ, in words."""
    for number in range(max(len(saved), len(here))):
        there_name = ascii(saved[number]) if number < len(saved) else 'nothing'
        here_name = ascii(here[number]) if number < len(here) else 'nothing'
        if there_name != here_name:
            return (f'{len(saved)} classes, these data have {len(here)}, and class {number} is {there_name} '
                    f'there, {here_name} here')
    return f'{len(saved)} classes'


def data_changes(saved: dict[str, Any] | None, here: dict[str, Any]) -> list[str]:
    """What differs between the data of a checkpoint and those of this run, a phrase per split.

    Args:
        saved: from the checkpoint, by split; None if it does not describe its data.
        here: of this run, by split.
    """
    changes = []
    for split, old in (saved or {}).items():
        new = here.get(split, old)
        if old['count'] != new['count']:
            changes.append(f'{split} has {new["count"]} images in place of {old["count"]}')
        elif old['digest'] != new['digest']:
            changes.append(f'{split} has as many images as before, but other names among them')
    return changes


def changed_settings(config: Any, saved: dict[str, Any], free: tuple[str, ...],
                     flag_of: Callable[[Any, str], str]) -> list[str]:
    """Settings that differ from those of the checkpoint, as 'flag old -> new'.

    Args:
        config: of this run.
        saved: settings of the checkpoint, by name.
        free: names of settings that may change between two starts.
        flag_of: (config, name) -> the flag of a setting.
    """
    changed = []
    for name, value in vars(config).items():
        before = saved.get(name, saved.get(FORMER_NAMES.get(name), value))
        if name not in free and before != value:
            changed.append(f'{flag_of(config, name)} {before} -> {value}')
    return changed


def repair_best(path: Path, prefix: str, content: dict[str, Any]) -> None:
    """Make `-best` again if it is missing although this very checkpoint is the best one so far.

    Args:
        path: the checkpoint.
        prefix: begins the names of the checkpoints.
        content: of the checkpoint.
    """
    best = path.with_name(f'{prefix}-best.pth')
    run = content.get('run', {})
    epochs_ended = run.get('epochs_ended', 0)
    is_best = epochs_ended > 0 and run.get('best_epoch', -1) == epochs_ended
    if is_best and not best.exists() and content['iter'] == 0:
        link_or_copy(path, best)
        logger.info('%r was missing: it is the checkpoint of this start', str(best))
