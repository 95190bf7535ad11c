"""What a run tells those who watch it: heartbeat.json while it lives, restarts.jsonl of starts and ends."""
import datetime
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import dist
from training.pace import Pace
from utils.console import one_line
from utils.files import write_text
from utils.log import append_json_line, read_json_lines
from utils.stop import Stopped

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 30
LONGEST_REASON = 300  # letters of an error in restarts.jsonl; those of torch may hold a trace
# variables of the environment that a start notes: by the beginning of their names, and by name
NOTED_PREFIXES = ('NCCL_', 'TORCH_NCCL_', 'GLOO_', 'OMP_')
NOTED_NAMES = ('CUDA_VISIBLE_DEVICES', 'SLURM_JOB_ID', 'SLURM_RESTART_COUNT', 'TORCHELASTIC_RESTART_COUNT',
               'TORCH_DISABLE_SHARE_RDZV_TCP_STORE', 'PYTORCH_CUDA_ALLOC_CONF')


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')


# ---------------------------------------------------------------------------------------------- heartbeat
class Heartbeat:
    """Writes heartbeat.json now and then; the first rank alone does.

    Args:
        folder: the output folder.
        total_steps, steps_per_epoch: of the training.
        images_per_step: of all ranks together.
        steps_done: at the start.
        pace: knows the slowest rank and the hosts.
    """

    def __init__(self, folder: Path, total_steps: int, steps_per_epoch: int, images_per_step: int,
                 steps_done: int, pace: Pace):
        self.path = folder / 'heartbeat.json'
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.images_per_step = images_per_step
        self.steps_done = steps_done
        self.pace = pace
        self.images_per_second = 0.
        self._last = time.monotonic()
        self._steps_at_last = steps_done
        self._has_failed = False

    def beat(self, doing: str, is_due: bool = False) -> None:
        """Write the file, if the last time was half a minute ago, or if it `is_due` in any case.

        Args:
            doing: what the run does now: training, evaluating, done or stopped.
        """
        seconds = time.monotonic() - self._last
        if not dist.is_master() or not (is_due or seconds >= HEARTBEAT_SECONDS):
            return
        num_steps = self.steps_done - self._steps_at_last
        if num_steps:
            self.images_per_second = round(num_steps * self.images_per_step / max(seconds, 1e-9), 2)
        slowest = self.pace.slowest
        content = dict(
            time=now(),
            doing=doing,
            step=self.steps_done,
            total_steps=self.total_steps,
            epoch=self.steps_done // self.steps_per_epoch,
            images_per_second=self.images_per_second,
            slowest=slowest._asdict() if slowest else None,
            hosts=list(dict.fromkeys(self.pace.hosts)),
        )
        self._last = time.monotonic()
        self._steps_at_last = self.steps_done
        try:
            write_text(self.path, json.dumps(content, indent=1) + '\n')
        except OSError as error:
            # Those who watch the run notice an old file; the run itself can do without it.
            if not self._has_failed:
                logger.warning('cannot write %r (%s): the run goes on without it', str(self.path), error)
            self._has_failed = True


# ---------------------------------------------------------------------------------------------- restarts
class History:
    """A context around a training that writes restarts.jsonl: a line for its start, and one for its end.

    A start without a line for its end was killed. The first rank alone writes.

    Args:
        folder: the output folder.
        facts: what the line of the start says beside the time and the end of the start before it.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.path = folder / 'restarts.jsonl'
        self.facts = facts

    def __enter__(self) -> 'History':
        if dist.is_master():
            line = dict(time=now(), previous=last_end(self.path), **self.facts)
            append_json_line(self.path, line)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if error is None:
            self.end('done')
        elif isinstance(error, Stopped):
            self.end('stopped')
        elif isinstance(error, KeyboardInterrupt):
            self.fail('interrupted before a checkpoint was saved')
        else:
            self.fail(one_line(error)[:LONGEST_REASON])

    def fail(self, reason: str) -> None:
        """Write the line of an end that is no good one."""
        self.end(f'failed: {reason}')

    def end(self, how: str) -> None:
        """Write the line of the end: done, stopped, or failed and why."""
        if not dist.is_master():
            return
        try:
            append_json_line(self.path, dict(time=now(), end=how))
        except OSError as error:  # a full disk, which has ended the run as well
            logger.warning('%s', error)


def last_end(path: Path) -> str | None:
    """How the last start in a file of restarts ended; None if there was none."""
    lines = read_json_lines(path)
    return lines[-1].get('end', 'killed') if lines else None


def describe_start(hosts: list[str]) -> dict[str, Any]:
    """On what a start runs; every rank calls it.

    Args:
        hosts: of every rank.
    """
    launchers = dist.allgather_object(this_launcher())
    return dict(
        world_size=dist.get_world_size(),
        hosts=list(dict.fromkeys(hosts)),
        launchers=list(dict.fromkeys(launchers)),
        environment=noted_variables(os.environ),
    )


def noted_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how ranks talk and compute; none of them is a secret."""
    return {name: environment[name] for name in sorted(environment)
            if name.startswith(NOTED_PREFIXES) or name in NOTED_NAMES}


def this_launcher() -> str:
    """Host and process of what has started this process."""
    return f'{dist.host_name()}:{os.getppid()}'


def refuse_restart_after_stop(folder: Path) -> None:
    """Do not begin again where torchrun restarts a training that a signal has stopped.

    To torchrun, exit code 75 is a failure like any other, after which `--max-restarts` starts all ranks
    again. But the machine is about to be taken away.

    Raises:
        Stopped: the last start in this folder was of the same launcher, and was stopped.
    """
    if int(os.environ.get('TORCHELASTIC_RESTART_COUNT') or 0) == 0:
        return
    lines = read_json_lines(folder / 'restarts.jsonl')
    starts = [line for line in lines if 'launchers' in line]
    if starts and lines[-1].get('end') == 'stopped' and this_launcher() in starts[-1]['launchers']:
        raise Stopped('a signal has stopped this run, and torchrun has started it again: it stays stopped; '
                      'run the same command again to go on')
