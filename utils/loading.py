"""Batches of a training that survive the death of a loader process, and the errors of such a death."""
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)
MAX_RESTARTS = 3  # of the loader processes in a row, without a batch in between


class LoaderDied(Exception):
    """A loader process ended by itself; its parent does not know what became of its batches."""


@contextlib.contextmanager
def named_loader_errors() -> Iterator[None]:
    """A context in which torch's errors about loader processes become errors with a remedy.

    Raises:
        ValueError: shared memory is too small for the batches.
        LoaderDied: a loader process was killed, or died by itself.
    """
    try:
        yield
    except (ConnectionError, EOFError) as error:  # the process died while it handed over a batch
        raise LoaderDied(str(error) or type(error).__name__) from error
    except (RuntimeError, OSError) as error:
        text = str(error)
        # A worker that finds shared memory full either gets an error or is killed by a bus error.
        out_of_memory = ('shared memory' in text or 'Bus error' in text
                         or ('No space left on device' in text and '/torch_' in text))
        if out_of_memory:
            raise ValueError('the loader processes need more shared memory than /dev/shm has: enlarge it '
                             '(docker run --shm-size=8g, or --ipc=host), or pass --workers=0') from error
        if 'DataLoader worker' in text and ('killed by signal' in text or 'exited unexpectedly' in text):
            raise LoaderDied(' '.join(text.split())) from error
        raise


def without_child_signal(loader: Iterable) -> Iterator[Any]:
    """Iterate over a loader; the death of a loader process raises an error here and nowhere else.

    Raises:
        ValueError: shared memory is too small for the batches.
        LoaderDied: a loader process has died.
    """
    iterator = begun(loader)
    with named_loader_errors():
        yield from iterator


def begun(loader: Iterable) -> Iterator[Any]:
    """`iter(loader)` without the handler that torch installs with it.

    The handler raises an error when any child dies, wherever the program stands at that moment: in the middle
    of a checkpoint, say. The queue of batches notices it as well, some seconds later.
    """
    with named_loader_errors():
        iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return iterator


def restarting_batches(make_loader: Callable[[tuple[int, int]], DataLoader], start: tuple[int, int],
                       steps_per_epoch: int) -> Iterator[Any]:
    """The batches of an endless loader; where a loader process dies, a new loader goes on at the same batch.

    The first loader begins at once: it draws a number from torch's generator, and what is drawn afterwards,
    such as the weights of a model, follows from the seed only as long as this comes first.

    Args:
        make_loader: (epoch, step) -> a loader that begins there; equal positions give equal batches.
        start: the first position.
        steps_per_epoch: batches of an epoch.
    Raises:
        ValueError: loader processes die again and again.
    """
    return _going_on(begun(make_loader(start)), make_loader, start, steps_per_epoch)


def _going_on(batches: Iterator[Any] | None, make_loader: Callable[[tuple[int, int]], DataLoader],
              position: tuple[int, int], steps_per_epoch: int) -> Iterator[Any]:
    """`batches`, which begin at `position`, and those of further loaders after a death."""
    epoch, step = position
    restarts = 0
    while True:
        try:
            if batches is None:
                batches = begun(make_loader((epoch, step)))
            with named_loader_errors():
                for batch in batches:
                    yield batch
                    restarts = 0
                    step += 1
                    if step == steps_per_epoch:
                        epoch = epoch + 1
                        step = 0
            batches = None
        except LoaderDied as death:
            restarts += 1
            if restarts > MAX_RESTARTS:
                raise ValueError(f'loader processes died {restarts} times in a row ({death}): the machine '
                                 'may be out of memory, pass fewer --workers') from None
            logger.warning('a loader process died (%s): the loader is started again at epoch %d, step %d',
                           death, epoch, step)
            batches = None  # its other processes end before new ones begin
