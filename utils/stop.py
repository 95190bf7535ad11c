"""Ending a training in order: a signal is remembered, the step is finished, a checkpoint is saved."""
import signal
import threading
from types import FrameType, TracebackType

# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1', 'SIGINT')
                     if hasattr(signal, name))


class Stopped(Exception):
    """A training ended because a signal asked for it; everything is saved, and the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: not finished, try again


class StopRequest:
    """A context in which SIGTERM, SIGUSR1 and SIGINT are remembered, and do not end the process.

    Cluster schedulers send one of these signals some time before they take a machine away. A second Ctrl-C
    interrupts at once, for those who do not want to wait for the checkpoint.

    Attributes:
        signal_name: of the last signal, such as 'SIGTERM'; '' before one came.
    """

    def __init__(self):
        self.signal_name = ''
        self._before: dict[int, object] = {}

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread of Python can handle signals
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def __bool__(self) -> bool:
        """Whether a signal came."""
        return bool(self.signal_name)


def leave_signals_to_parent(worker_id: int) -> None:
    """For loader processes: what ends a training is heard by its main process, which still needs them.

    A scheduler, or Ctrl-C in a terminal, sends a signal to all processes at once; loaders that died from it
    would take the batch with them that the last step is waiting for. They end with their parent.

    Args:
        worker_id: of torch's `worker_init_fn`, not used.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:  # by which the parent ends a loader that hangs
            signal.signal(number, signal.SIG_IGN)
