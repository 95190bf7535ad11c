"""Logs of a run: the console and stdout.txt, progress lines, meters, TensorBoard, and their repair."""
import datetime
import hashlib
import io
import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils.checkpoint import atomic_path
from utils.console import logger as console_logger
from utils.console import one_line_errors  # noqa: F401  known by this path, too
from utils.files import write_text
from utils.provenance import unusable_gpu

logger = logging.getLogger(__name__)
LEGEND = ('eta is the time until the end of the epoch, whole run that until the end of the training, tlr the '
          'learning rate, tnm the norm of the gradient before clipping, time and data the seconds of a step '
          'and of its waiting for images, mfu the used share of what the device can compute; '
          'data/tokenizer/model are shares of the time; "x (y)" is a value and its mean in this epoch')
MOST_WAITING = 0.2     # share of the time that a training may wait for data before something is said


def setup_logging(output_dir: str | None, is_master: bool, rank: int | None = None) -> None:
    """Send messages of the master and warnings of every rank to the console; the master's to stdout.txt, too.

    Args:
        output_dir: folder of stdout.txt; None writes none.
        is_master: whether this is the first rank.
        rank: writes all messages of this rank to rank_<rank>.txt in that folder as well; None does not.
    Raises:
        ValueError: a file cannot be written.
    """
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.DEBUG)
    line_format = logging.Formatter(
        '[{asctime}] ({filename}, line {lineno:3d})=> {message}',
        '%m-%d %H:%M:%S',
        style='{',
    )
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if is_master else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if output_dir and is_master:
        handlers.append(_file_handler(Path(output_dir) / 'stdout.txt'))
    if output_dir and rank is not None:
        handlers.append(_file_handler(Path(output_dir) / f'rank_{rank:03d}.txt'))
    for handler in handlers:
        handler.setFormatter(line_format)
        root.addHandler(handler)
    logging.captureWarnings(True)

    # A training calls this twice, the second time with its folder; once is enough.
    if is_master and not output_dir:
        note = unusable_gpu()
        if note:
            logger.warning('%s', note)


def _file_handler(path: Path) -> logging.Handler:
    """A handler that appends to `path`, where an earlier start may have written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open('a') as file:
                file.write('\n' * 7 + '=' * 30 + '  RESTART  ' + '=' * 30 + '\n')
        handler = _QuietFileHandler(path)
    except OSError as error:
        raise ValueError(f'cannot write to {str(path)!r} ({error.strerror or error}): free some space, '
                         'change its permissions, or pass another output folder') from None

    # Tracebacks of `one_line_errors` are debug messages; those of other modules are noise.
    def is_wanted(record: logging.LogRecord) -> bool:
        return record.levelno > logging.DEBUG or record.name == console_logger.name

    handler.addFilter(is_wanted)
    return handler


class _QuietFileHandler(logging.FileHandler):
    """Does not print a traceback for every message while the disk is full; the console has all messages."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called inside the `except` block of a message that could not be written."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class SmoothedValue:
    """A series of numbers with its median over a window and its average over everything.

    Args:
        window_size: number of last values in the window.
        fmt: how the meter is shown, with any of the properties by name.
    """

    def __init__(self, window_size: int = 30, fmt: str = '{median:.4f} ({global_avg:.4f})'):
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total = 0.
        self.count = 0
        self.fmt = fmt

    def update(self, value: float, n: int = 1) -> None:
        """Add a value, which counts `n` times in the average."""
        self.deque.append(value)
        self.count += n
        self.total += value * n

    @property
    def median(self) -> float:
        """Median of the window; 0 without values."""
        return float(np.median(self.deque)) if self.deque else 0.

    @property
    def avg(self) -> float:
        """Average of the window; 0 without values."""
        return sum(self.deque) / max(len(self.deque), 1)

    @property
    def global_avg(self) -> float:
        """Average of all values; 0 without values."""
        return self.total / max(self.count, 1)

    @property
    def max(self) -> float:
        """Largest value of the window."""
        return max(self.deque)

    @property
    def value(self) -> float:
        """The last value; 0 without values."""
        return self.deque[-1] if self.deque else 0.

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median,
            avg=self.avg,
            global_avg=self.global_avg,
            max=self.max if self.deque else 0.,
            value=self.value,
        )


class MetricLogger:
    """Meters of one epoch, and the progress line.

    Attributes:
        meters: by name.
        log_iters: iterations of the epoch after which a progress line is written.
        regular_iters: those of them that do not depend on where a start begins.
        notes: end every progress line.
        shares: of the time up to the last progress line that data, tokenizer and model took, and `mfu`.
    """

    def __init__(self, delimiter: str = '  '):
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter = delimiter
        self.log_iters = set()
        self.regular_iters: set[int] = set()
        self.notes: list[str] = []
        self.shares: dict[str, float] = {}

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Show `meter` under `name`, in place of one with the default format."""
        self.meters[name] = meter

    def update(self, **values: float | torch.Tensor | None) -> None:
        """Add one value to each named meter; None is skipped."""
        for name, value in values.items():
            if value is not None:
                self.meters.setdefault(name, SmoothedValue()).update(float(value))

    def log_every(self, start_it: int, max_iters: int, itrt: Iterable, num_lines: int, header: str = '',
                  images_per_iter: int = 0, tokenizer_seconds: Callable[[], float] = lambda: 0.,
                  on_waiting: Callable[[float], None] = lambda share: None,
                  take_flops: Callable[[], float] = lambda: 0., peak_flops: float = math.inf,
                  seconds_left: Callable[[int], float] | None = None,
                  ) -> Iterator[tuple[int, Any]]:
        """Yield (iteration, item), and write a progress line at evenly spaced iterations.

        The line ends with images/s, MFU, and the fractions of time spent on waiting for data, tokenizer and
        model. MFU, the utilisation by the products of the model, is their FLOPs over what the device could
        have done in all of that time.

        Args:
            start_it: the first iteration of this start.
            max_iters: iterations of the epoch.
            itrt: gives an item per iteration, from `start_it` on.
            num_lines: progress lines of a whole epoch.
            header: begins every line.
            images_per_iter: of all ranks together.
            tokenizer_seconds: gives the seconds spent in the tokenizer since its last call.
            on_waiting: is called with the share of the time since the last line that was spent on waiting for
                data, where it is above `MOST_WAITING`; not at the first line, when loaders have just begun.
            take_flops: gives the FLOPs of the model's products since its last call, on this rank.
            peak_flops: FLOP/s of this rank's device.
            seconds_left: gives the estimate of the seconds until the end of the run after an iteration, which
                the line shows beside the one for this epoch; None shows none.
        """
        # Evenly spaced over the epoch, so that they are the same if it is done by several starts.
        self.regular_iters = set(np.linspace(0, max_iters - 1, num_lines, dtype=int).tolist())
        self.log_iters = self.regular_iters | {start_it}
        width = len(str(max_iters))
        epoch_begin = time.time()
        iterator = iter(itrt)
        tokenizer_seconds()  # forget the time of an evaluation before this epoch
        take_flops()

        # Sums since the last line: seconds in all, seconds of waiting for data, iterations.
        seconds = 0.
        data_seconds = 0.
        num_iters = 0
        for it in range(start_it, max_iters):
            begin = time.time()
            item = next(iterator)
            data_seconds += time.time() - begin
            yield it, item  # the caller trains here
            seconds += time.time() - begin
            num_iters += 1
            if it not in self.log_iters:
                continue

            seconds_per_iter = (time.time() - epoch_begin) / (it + 1 - start_it)
            eta = datetime.timedelta(seconds=round(seconds_per_iter * (max_iters - it - 1)))
            seconds = max(seconds, 1e-9)
            data = data_seconds / seconds
            tokenizer = min(tokenizer_seconds() / seconds, 1.)
            model = max(1 - data - tokenizer, 0)
            parts = [f'{header} [{it:{width}d}/{max_iters}]', f'eta: {eta}']
            if seconds_left:
                parts.append(f'whole run: {datetime.timedelta(seconds=round(seconds_left(it)))}')
            parts += [f'{name}: {meter}' for name, meter in self.meters.items()]
            parts += [
                f'time: {seconds / num_iters:.3f}',
                f'data: {data_seconds / num_iters:.3f}',
                f'images/s: {images_per_iter * num_iters / seconds:.1f}',
            ]
            self.shares = dict(data=data, tokenizer=tokenizer, model=model)
            flops = take_flops()
            if flops:
                mfu = flops / seconds / peak_flops
                self.shares['mfu'] = mfu
                parts.append(f'mfu: {mfu:.1%}')
            parts.append(f'data/tokenizer/model: {data:.0%}/{tokenizer:.0%}/{model:.0%}')
            parts += self.notes
            logger.info(self.delimiter.join(parts))
            if it > start_it and data > MOST_WAITING:
                on_waiting(data)
            seconds = 0.
            data_seconds = 0.
            num_iters = 0


class TensorboardLogger:
    """Scalars and images under the tag head/name; on every rank but the first each call does nothing.

    Args:
        log_dir: folder of the files; None on ranks that write nothing.
        filename_suffix: ends the name of the file.
        every: steps between two points.
    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, log_dir: str | None, filename_suffix: str = '', every: int = 500):
        self.step = 0
        self.writer = None
        self.every = every
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter
            try:
                self.writer = SummaryWriter(log_dir=log_dir, filename_suffix=filename_suffix)
            except OSError as error:
                raise ValueError(f'cannot write to {log_dir!r} ({error.strerror or error}): free some space, '
                                 'or pass another output folder') from None

    def set_step(self, step: int) -> None:
        """Set the current step, at which `update` writes its points."""
        self.step = step

    def due(self) -> bool:
        """Whether step-wise scalars are written at the current step: the first one and every `every`th."""
        return self.step == 0 or (self.step + 1) % self.every == 0

    def update(self, head: str = 'scalar', step: int | None = None,
               **values: float | torch.Tensor | None) -> None:
        """Write scalars; without `step` at the current step, and only if that is `due`. None is skipped."""
        if self.writer is None or (step is None and not self.due()):
            return
        step = self.step if step is None else step
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(f'{head}/{name}', float(value), step)

    def log_tensor_as_distri(self, tag: str, values: torch.Tensor, step: int | None = None) -> None:
        """Write a histogram of values; without `step` at the current step."""
        if self.writer is not None:
            self.writer.add_histogram(tag, values, self.step if step is None else step)

    def log_image(self, tag: str, image_chw: torch.Tensor, step: int | None = None) -> None:
        """Write an image (3, H, W); without `step` at the current step."""
        if self.writer is not None:
            self.writer.add_image(tag, image_chw, self.step if step is None else step)

    def log_text(self, tag: str, text: str, step: int | None = None) -> None:
        """Write a text in Markdown; without `step` at the current step."""
        if self.writer is not None:
            self.writer.add_text(tag, text, self.step if step is None else step)

    def flush(self) -> None:
        """Make sure that all points are in the file."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """End the file."""
        if self.writer is not None:
            self.writer.close()


def mirror_in_wandb(project: str, name: str, folder: Path, settings: dict[str, Any]) -> None:
    """Send what TensorBoard files will get to Weights & Biases, too; to be called before they are opened.

    All starts of a training continue one run there, which is known by the path of its folder. Without a
    network, `WANDB_MODE=offline` keeps everything in `folder` for `wandb sync`.

    Args:
        project: of Weights & Biases. name: of the run there. folder: of the output.
        settings: of the training.
    Raises:
        ValueError: a run cannot begin, for want of a login or of a network.
    """
    import wandb
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    try:
        wandb.init(project=project, name=name, id=run_id, resume='allow', dir=str(folder), config=settings,
                   sync_tensorboard=True)
    except wandb.Error as error:
        message = ' '.join(str(error).split())
        raise ValueError(f'--wandb cannot begin a run ({message}): log in by wandb login, or set '
                         'WANDB_MODE=offline') from None


def progress_bar(total: int, text: str, unit: str = 'image') -> tqdm:
    """A bar with rate and remaining time on the master's console; in a file, a line now and then.

    Work that is done within two seconds stays silent.

    Args:
        total: number of units in all.
        text: stands before the bar.
        unit: what is counted.
    """
    seconds = 0.5 if sys.stderr.isatty() else 30.
    is_other_rank = int(os.environ.get('RANK', 0)) > 0
    return tqdm(
        total=total,
        desc=text,
        unit=unit,
        disable=is_other_rank,
        delay=2,
        mininterval=seconds,
        maxinterval=max(seconds, 10.),
        leave=False,
    )


def append_json_line(path: Path, values: dict[str, Any]) -> None:
    """Add one line to a log of JSON lines; numbers that are not finite become null, as JSON has none.

    Raises:
        OSError: the line cannot be written; the message names the file.
    """
    line = json.dumps(_finite_or_none(values), allow_nan=False) + '\n'
    try:
        with path.open('a') as file:
            file.write(line)
    except OSError as error:
        raise OSError(f'could not write to {str(path)!r} ({error.strerror or error}): free some space and '
                      'run the same command again') from error


def _finite_or_none(value: Any) -> Any:
    """The same value with None in the place of every number that is nan or infinite."""
    if isinstance(value, dict):
        return {name: _finite_or_none(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log of JSON lines; a line that a kill or a full disk has cut off is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(errors='replace').splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def keep_json_lines(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Remove from a log of JSON lines those that were cut off, and those that `is_kept` says no to.

    The other lines stay as they are.
    """
    if not path.is_file():
        return
    text = path.read_text(errors='replace')
    kept = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and is_kept(content):
            kept.append(line + '\n')
    repaired = ''.join(kept)
    if repaired != text:
        write_text(path, repaired)


def keep_events(folder: Path, is_kept: Callable[[str, int], bool]) -> None:
    """Remove points from the TensorBoard files of a folder, and the end of a file that was cut off.

    Files that need no change are not written.

    Args:
        is_kept: (tag, step) -> whether the point stays.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter
    for path in sorted(folder.glob('events.out.tfevents.*')):
        kept = io.BytesIO()
        writer = RecordWriter(kept)
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            values = [value for value in event.summary.value if is_kept(value.tag, event.step)]
            # A record without a removed point keeps its bytes; one without points is left out.
            if len(values) == len(event.summary.value):
                writer.write(record)
            elif values:
                del event.summary.value[:]
                event.summary.value.extend(values)
                writer.write(event.SerializeToString())
        if kept.getvalue() != path.read_bytes():
            with atomic_path(path) as temporary:
                temporary.write_bytes(kept.getvalue())
