"""Faults that a training survives up to a limit: steps that are not finite, images that cannot be read.

A loss that leaps without being infinite is only named.

Every rank has the same counts: a step is left out on all ranks or on none, and ranks tell each other which
images they could not read.
"""
import logging
import math
import statistics
from collections import deque
from pathlib import Path

import dist
from trainer import StepInfo
from training.resume import RunState
from utils.log import append_json_line

logger = logging.getLogger(__name__)
REMEDIES = {  # by the precision of the config
    0: 'lower the learning rate, or look at the images that not_finite.jsonl names',
    1: 'float16 overflows: train in bfloat16 (--fp16=2) or float32 (--fp16=0), or lower the learning rate',
    2: 'lower the learning rate, train in float32 (--fp16=0), or look at the images that not_finite.jsonl '
       'names',
}


class NotFinite(ValueError):
    """Too many steps in a row had a loss or gradient that is nan or infinite.

    Attributes:
        step: the last of these steps, since the beginning of the training.
        at_once: whether no step since the start was finite; then the checkpoint itself may be at fault.
        at_end: whether the training ends with them, so that nothing would follow a restored checkpoint.
    """

    def __init__(self, message: str, step: int, at_once: bool, at_end: bool):
        super().__init__(message)
        self.step = step
        self.at_once = at_once
        self.at_end = at_end


class SkippedSteps:
    """Counts steps whose loss or gradient was not finite, names their images, and knows when to give up.

    Args:
        folder: where not_finite.jsonl is written.
        state: its `skipped_steps` counts these steps, those of earlier starts included.
        limit: `report` gives up after this many in a row; 0 means no limit.
        precision: of the config, for the advice.
        is_resumed: whether this start continues a checkpoint.
    """

    def __init__(self, folder: Path, state: RunState, limit: int, precision: int, is_resumed: bool):
        self.folder = folder
        self.state = state
        self.limit = limit
        self.precision = precision
        self.is_resumed = is_resumed
        self.in_a_row = 0
        self.suspects: list[str] = []  # images of the steps in this row
        self.steps_since_start = 0

    def count(self, info: StepInfo) -> None:
        """Count a step, by its outcome."""
        self.steps_since_start += 1
        if info.is_finite:
            self.in_a_row = 0
            self.suspects = []
        else:
            self.in_a_row += 1
            self.state.skipped_steps += 1

    def report(self, epoch: int, step: int, info: StepInfo, images: list[str]) -> None:
        """Log the images of a step that was left out; every rank calls it.

        Args:
            epoch: the current one, from 0 on.
            step: since the beginning of the training.
            info: outcome of the step.
            images: names of the images of this rank.
        Raises:
            NotFinite: there were too many such steps in a row.
        """
        # The loss of one rank may show which images are at fault. If all losses are finite, the gradient was
        # not, and all images are under suspicion.
        parts = dist.allgather_object((bool(info.loss.isfinite()), images))
        suspects = []
        all_images = []
        for is_finite, names in parts:
            all_images += names
            if not is_finite:
                suspects += names
        suspects = suspects or all_images
        self.suspects += suspects
        if dist.is_master():
            append_json_line(self.folder / 'not_finite.jsonl', dict(step=step, epoch=epoch, images=suspects))
            logger.warning('step %d is left out, its loss or gradient is not finite (%d so far); %d images, '
                           'first %s; all are in not_finite.jsonl',
                           step, self.state.skipped_steps, len(suspects), suspects[0])
        if self.limit and self.in_a_row >= self.limit:
            self.give_up(step)

    def give_up(self, step: int, at_end: bool = False) -> None:
        """Stop the training because of steps that were not finite, of which `step` is the last.

        Args:
            at_end: whether it is the last step of the training.
        Raises:
            NotFinite: always.
        """
        at_once = self.is_resumed and 0 < self.in_a_row == self.steps_since_start
        count = f'the last {self.in_a_row} steps' if self.in_a_row else 'steps'
        raise NotFinite(f'{count} up to step {step} were not finite: {REMEDIES[self.precision]}, and run '
                        'again from the last checkpoint, if there is one (--max_skipped_steps is the limit)',
                        step, at_once, at_end)

    def leave_out(self, last: int) -> tuple[int, int]:
        """Note which steps are left out when the last checkpoint is restored.

        These are the steps in this row, and as many before them: one of those may have made the weights so
        large that the next ones overflowed.

        Args:
            last: the last step that was not finite, since the beginning of the training.
        Returns:
            The first and the last step that are left out.
        """
        first = max(last + 1 - 2 * self.in_a_row, 0)
        if dist.is_master():
            logger.warning('the last checkpoint is restored, and steps %d to %d are left out; left_out.jsonl '
                           'names the images of those that were not finite', first, last)
            append_json_line(self.folder / 'left_out.jsonl',
                             dict(first=first, last=last, images=self.suspects))
        return first, last


class LossSpikes:
    """Names steps whose loss leaps far above that of the steps before them.

    Attributes:
        losses: of the last finite steps.
        quiet_until: no step before this one is named, so that a higher plateau gives one line.
    """

    WINDOW = 100    # steps that a loss is compared with
    DEVIATIONS = 8  # a leap is so many standard deviations above their median
    RATIO = 1.2     # and so many times the median

    def __init__(self):
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.quiet_until = 0

    def add(self, step: int, loss: float) -> None:
        """Take in the loss of a step, and log a line if it leaps; the first rank alone does.

        Args:
            step: since the beginning of the training.
            loss: mean over all ranks; nan and infinite ones are counted elsewhere.
        """
        if not math.isfinite(loss):
            return
        if len(self.losses) == self.WINDOW and step >= self.quiet_until:
            # Median and median distance from it: a leap does not hide the next one.
            middle = statistics.median(self.losses)
            deviation = 1.4826 * statistics.median(abs(before - middle) for before in self.losses)
            if loss > middle + self.DEVIATIONS * deviation and loss > self.RATIO * middle > 0:
                if dist.is_master():
                    logger.warning('the loss leaps at step %d: %.4g, and the median of the %d steps before '
                                   'is %.4g', step, loss, self.WINDOW, middle)
                self.quiet_until = step + self.WINDOW
        self.losses.append(loss)


class BadImages:
    """Lists training images that could not be read and were replaced by others.

    Args:
        known: a line for each image that was replaced so far, by earlier starts, too; new ones are added.
        limit: the run ends when there are more than these.
    """

    def __init__(self, known: list[str], limit: int):
        self.reasons = known
        self.limit = limit

    def add(self, damage_B: list[str]) -> None:
        """Add the images of a step that could not be read; every rank calls it, and all lists are the same.

        Args:
            damage_B: for every image of this rank's batch why it could not be read, or ''.
        Raises:
            ValueError: there are more of them than the limit.
        """
        known = set(self.reasons)
        parts: list[list[str]] = dist.allgather_object([reason for reason in damage_B if reason])
        for part in parts:
            for reason in part:
                if reason in known:
                    continue
                known.add(reason)
                self.reasons.append(reason)
                if dist.is_master():
                    logger.warning('an image is replaced by another one: %s', reason)
        if len(self.reasons) > self.limit:
            raise ValueError(f'{len(self.reasons)} training images cannot be read, --max_bad_images='
                             f'{self.limit} allows fewer; the last one: {self.reasons[-1]}')
