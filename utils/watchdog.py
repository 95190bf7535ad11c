"""Ending a process in which nothing moves any more, with a word on where it stands.

A collective in which one rank is missing waits for half an hour, and then says only that it has waited.
"""
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

EXIT_CODE = 70          # EX_SOFTWARE of sysexits.h
WRITING_SECONDS = 20    # for the stacks; a file system that hangs must not keep the process alive
OTHERS_SECONDS = 5      # until the process ends, in which the watchdogs of other ranks write their stacks


class Watchdog:
    """A context that ends the process if `feed` is not called for a while.

    It is a thread, which works while the main thread hangs in a collective, a read or a call of CUDA.

    Args:
        minutes: without a call, until the process ends; 0 is off.
        path: where the stacks of all threads are written.
        what: a name of the process, for the message.
        at_end: is called before the process ends, with the reason.
    """

    def __init__(self, minutes: float, path: Path, what: str, at_end: Callable[[str], None]):
        self.seconds = 60 * minutes
        self.path = path
        self.what = what
        self.at_end = at_end
        self._fed = time.monotonic()
        self._is_over = threading.Event()

    def feed(self) -> None:
        """Say that something has moved."""
        self._fed = time.monotonic()

    def __enter__(self) -> 'Watchdog':
        self.feed()
        self._is_over.clear()
        if self.seconds:
            threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(min(1., self.seconds / 10)):
            if time.monotonic() - self._fed > self.seconds:
                self._end()

    def _end(self) -> None:
        """Write the stacks, and end the process whatever its other threads do."""
        reason = f'nothing has moved for {self.seconds / 60:g} minutes (--watchdog)'
        sys.stderr.write(f'{self.what}: {reason}; what its threads do is in {str(self.path)!r}\n')
        sys.stderr.flush()
        writer = threading.Thread(target=self._write, args=(reason,), daemon=True)
        writer.start()
        writer.join(WRITING_SECONDS)
        time.sleep(OTHERS_SECONDS)
        os._exit(EXIT_CODE)

    def _write(self, reason: str) -> None:
        with self.path.open('w') as file:
            file.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {self.what}: {reason}\n\n')
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self.at_end(reason)
