"""Logs of a training after a restart: every step and every epoch stands in them once.

Lines and points are written before the checkpoint that covers them, so that a kill never loses one; what is
later than the checkpoint that a start continues from is taken out again, since the start repeats it.
"""
import logging
from pathlib import Path
from typing import Any

from utils.log import keep_events, keep_json_lines, read_json_lines

logger = logging.getLogger(__name__)
EPOCH_HEADS = ('AR_ep_loss/', 'AR_z_burnout/', 'VAE_ep/')  # tags whose points are counted in epochs


def rewind(folder: Path, tb_dir: Path, steps_done: int, epochs_ended: int) -> None:
    """Take out of the logs what is later than a checkpoint, and lines that were torn.

    Args:
        folder: of log.txt and steps.jsonl. tb_dir: of the TensorBoard files.
        steps_done: optimizer steps in the checkpoint.
        epochs_ended: epochs in it whose line stands in log.txt.
    """
    keep_json_lines(folder / 'steps.jsonl', lambda line: line.get('step', -1) < steps_done)
    keep_json_lines(folder / 'not_finite.jsonl', lambda line: line.get('step', -1) < steps_done)
    keep_json_lines(folder / 'log.txt', lambda line: epoch_of(line) <= epochs_ended)
    if tb_dir.is_dir():
        keep_events(tb_dir, lambda tag, step:
                    step <= epochs_ended if tag.startswith(EPOCH_HEADS) else
                    # a picture or histogram after step n is of the first n steps, as a checkpoint is
                    step <= steps_done if tag.startswith(('VAE_pictures/', 'VAE_codes/')) else
                    # step 0 also draws the starting level, far to the left of it
                    0 < steps_done > step)


def set_logs_aside(folder: Path, tb_dir: Path) -> None:
    """Make room for a run that begins anew, where an earlier one without a checkpoint has left logs.

    Nothing is deleted: the files get a number.
    """
    for path in (folder / 'steps.jsonl', folder / 'not_finite.jsonl', folder / 'log.txt', tb_dir):
        if not path.exists():
            continue
        number = 1
        while path.with_name(f'{path.name}.before{number}').exists():
            number += 1
        path.rename(path.with_name(f'{path.name}.before{number}'))


def epoch_of(line: dict[str, Any]) -> int:
    """Number of the epoch, from 1 on, that a line of log.txt is of; 0 for its first line."""
    number = str(line.get('ep', '0')).partition('/')[0]
    return int(number) if number.isdecimal() else 0


def logged_steps(folder: Path, first: int, last: int) -> list[dict[str, Any]]:
    """The lines of steps.jsonl of steps in [first, last)."""
    return [line for line in read_json_lines(folder / 'steps.jsonl') if first <= line.get('step', -1) < last]
