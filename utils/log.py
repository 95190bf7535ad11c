"""Logs of a run: the console and stdout.txt, progress lines, meters, TensorBoard."""
import datetime
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

logger = logging.getLogger(__name__)


def setup_logging(output_dir: str | None, is_master: bool) -> None:
    """The master's messages and all warnings on the console; the master's also in `output_dir`/stdout.txt."""
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.DEBUG)
    line = logging.Formatter('[{asctime}] ({filename}, line {lineno:3d})=> {message}', '%m-%d %H:%M:%S',
                             style='{')
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if is_master else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if output_dir and is_master:
        path = Path(output_dir) / 'stdout.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open('a') as file:
                file.write('\n' * 7 + '=' * 30 + '  RESTART  ' + '=' * 30 + '\n')
        handlers.append(logging.FileHandler(path))
        handlers[-1].addFilter(lambda record: record.levelno > logging.DEBUG or record.name == __name__)
    for handler in handlers:
        handler.setFormatter(line)
        root.addHandler(handler)
    logging.captureWarnings(True)


class SmoothedValue:
    """A series with its median over a window and its average over everything."""

    def __init__(self, window_size: int = 30, fmt: str = '{median:.4f} ({global_avg:.4f})'):
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total, self.count, self.fmt = 0., 0, fmt

    def update(self, value: float, n: int = 1) -> None:
        self.deque.append(value)
        self.count += n
        self.total += value * n

    @property
    def median(self) -> float:
        return float(np.median(self.deque)) if self.deque else 0.

    @property
    def avg(self) -> float:
        return sum(self.deque) / max(len(self.deque), 1)

    @property
    def global_avg(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def max(self) -> float:
        return max(self.deque)

    @property
    def value(self) -> float:
        return self.deque[-1] if self.deque else 0.

    def __str__(self) -> str:
        return self.fmt.format(median=self.median, avg=self.avg, global_avg=self.global_avg,
                               max=self.max if self.deque else 0., value=self.value)


class MetricLogger:
    """Meters of one epoch, and the progress line."""

    def __init__(self, delimiter: str = '  '):
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter, self.log_iters = delimiter, set()

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def update(self, **values: float | torch.Tensor | None) -> None:
        """Add one value to each named meter; None is skipped."""
        for name, value in values.items():
            if value is not None:
                self.meters.setdefault(name, SmoothedValue()).update(float(value))

    def log_every(self, start_it: int, max_iters: int, itrt: Iterable, num_lines: int, header: str = '',
                  images_per_iter: int = 0,
                  tokenizer_seconds: Callable[[], float] = lambda: 0.) -> Iterator[tuple[int, Any]]:
        """Yield (iteration, item) and write a progress line at `num_lines` evenly spaced iterations.

        The line ends with images/s and the shares of time spent on waiting for data, tokenizer and model.
        """
        self.log_iters = set(np.linspace(0, max_iters - 1, num_lines, dtype=int).tolist()) | {start_it}
        width, epoch_begin = len(str(max_iters)), time.time()
        iterator, window = iter(itrt), dict(seconds=0., data=0., iters=0)
        tokenizer_seconds()  # forget what an evaluation spent
        for it in range(start_it, max_iters):
            begin = time.time()
            item = next(iterator)
            window['data'] += time.time() - begin
            yield it, item
            window['seconds'] += time.time() - begin
            window['iters'] += 1
            if it in self.log_iters:
                per_iter = (time.time() - epoch_begin) / (it + 1 - start_it)
                eta = datetime.timedelta(seconds=round(per_iter * (max_iters - it - 1)))
                seconds = max(window['seconds'], 1e-9)
                data, tokens = window['data'] / seconds, min(tokenizer_seconds() / seconds, 1.)
                logger.info(self.delimiter.join([
                    f'{header} [{it:{width}d}/{max_iters}]', f'eta: {eta}',
                    *(f'{name}: {meter}' for name, meter in self.meters.items()),
                    f'time: {seconds / window["iters"]:.3f}', f'data: {window["data"] / window["iters"]:.3f}',
                    f'images/s: {images_per_iter * window["iters"] / seconds:.1f}',
                    f'data/tokenizer/model: {data:.0%}/{tokens:.0%}/{max(1 - data - tokens, 0):.0%}']))
                window = dict(seconds=0., data=0., iters=0)


class TensorboardLogger:
    """Scalars and images under the tag head/name; on every rank but the first each call does nothing.

    Args:
        every: steps between two points.
    """

    def __init__(self, log_dir: str | None, filename_suffix: str = '', every: int = 500):
        self.step, self.writer, self.every = 0, None, every
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(log_dir=log_dir, filename_suffix=filename_suffix)

    def set_step(self, step: int) -> None:
        self.step = step

    def due(self) -> bool:
        """Whether step-wise scalars are written at the current step: the first one and every `every`th."""
        return self.step == 0 or (self.step + 1) % self.every == 0

    def update(self, head: str = 'scalar', step: int | None = None,
               **values: float | torch.Tensor | None) -> None:
        """Write scalars; without `step` at the current one, and only if it is `due`."""
        if self.writer is None or (step is None and not self.due()):
            return
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(f'{head}/{name}', float(value), self.step if step is None else step)

    def log_tensor_as_distri(self, tag: str, values: torch.Tensor, step: int | None = None) -> None:
        if self.writer is not None:
            self.writer.add_histogram(tag, values, self.step if step is None else step)

    def log_image(self, tag: str, image_chw: torch.Tensor, step: int | None = None) -> None:
        if self.writer is not None:
            self.writer.add_image(tag, image_chw, self.step if step is None else step)

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def progress_bar(total: int, text: str, unit: str = 'image') -> tqdm:
    """A bar with rate and remaining time on the master's console; a line now and then where it is a file.

    Small totals, done in a moment, stay silent.
    """
    seconds = 0.5 if sys.stderr.isatty() else 30.
    return tqdm(total=total, desc=text, unit=unit, disable=int(os.environ.get('RANK', 0)) > 0, delay=2,
                mininterval=seconds, maxinterval=max(seconds, 10.), leave=False)


def append_json_line(path: Path, values: dict[str, Any]) -> None:
    """Add one line to a log of JSON lines."""
    with path.open('a') as file:
        file.write(json.dumps(values) + '\n')


@contextmanager
def one_line_errors(program: str, exit_code: int = 1) -> Iterator[None]:
    """Report what a user can mend in one line and exit; the traceback goes to stdout.txt.

    Under torchrun the first rank speaks first, and the launcher then ends the others before they repeat it.

    Args:
        exit_code: unless the error has one of its own.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f'{program}: interrupted; run the same command again to go on')
    except (ValueError, OSError) as error:
        logger.debug('', exc_info=True)
        message = str(error).strip().splitlines()[-1]  # a loader process prepends its own traceback
        time.sleep(2 if int(os.environ.get('RANK', 0)) > 0 else 0)
        stop = SystemExit(f'{program}: {message.removeprefix("ValueError: ")}')
        code = getattr(error, 'exit_code', exit_code)
        if code != 1:  # python prints a message itself, but only with code 1
            sys.stderr.write(f'{stop}\n')
            stop.code = code
        raise stop from None
