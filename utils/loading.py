"""Batches that survive the death of a loader process, or one that hangs, and the errors of these."""
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)
MAX_RESTARTS = 3  # of the loader processes in a row, without a batch in between


class LoaderDied(Exception):
    """A loader process ended by itself; its parent does not know what became of its batches."""

    remedy = 'the machine may be out of memory, pass fewer --workers'


class LoaderHung(LoaderDied):
    """Loader processes were ended, since no batch came for too long."""

    remedy = 'the disk of --data_path may not answer, or batches take longer than --loader_timeout allows'


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


def without_child_signal(loader: Iterable, patience: float = 0.) -> Iterator[Any]:
    """Iterate over a loader, which must give the same batches each time; the death of a loader process raises
    no error anywhere else.

    After a death the loader begins again, and the batches that were there before are left out.

    Args:
        patience: see `watched`.
    Raises:
        ValueError: shared memory is too small for the batches, or loader processes die again and again.
    """
    deaths = Deaths()
    num_done = 0
    iterator = begun(loader)
    while True:
        try:
            for number, batch in enumerate(watched(iterator, patience)):
                if number < num_done:
                    continue
                yield batch
                num_done += 1
                deaths.in_a_row = 0
            return
        except LoaderDied as death:
            deaths.count(death, f'batch {num_done}')
            iterator = None  # its other processes end before new ones begin
        # What the caller draws from torch's generator stays as it would be without a death.
        with torch.random.fork_rng(devices=[]):
            iterator = begun(loader)


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


def watched(iterator: Iterator[Any], patience: float) -> Iterator[Any]:
    """The batches of a loader, whose processes are ended where none comes.

    The `timeout` of torch's loader does not serve: a process that has died would be noticed that late, too.

    Args:
        patience: minutes to wait for a batch; 0 waits forever.
    Raises:
        ValueError: shared memory is too small for the batches.
        LoaderDied: a loader process has died, or all of them were ended.
    """
    workers = getattr(iterator, '_workers', ())  # there are none where the main process loads
    has_hung = threading.Event()

    def end_workers() -> None:
        has_hung.set()
        for worker in workers:
            worker.kill()  # a process that waits for a disk, or was stopped, hears nothing else

    while True:
        timer = threading.Timer(60 * patience, end_workers)
        timer.daemon = True
        if patience and workers:
            timer.start()
        try:
            with named_loader_errors():
                batch = next(iterator)
        except StopIteration:
            return
        except Exception:
            # What ended processes leave behind may raise anything.
            if has_hung.is_set():
                raise LoaderHung(f'no batch came for {patience:g} minutes') from None
            raise
        finally:
            timer.cancel()
        yield batch


class Deaths:
    """Counts loaders that died or hung.

    Attributes:
        in_a_row: without a batch in between.
    """

    def __init__(self):
        self.in_a_row = 0

    def count(self, death: LoaderDied, position: str) -> None:
        """Count a death and log it.

        Args:
            position: where a new loader is to go on.
        Raises:
            ValueError: there were too many.
        """
        self.in_a_row += 1
        if self.in_a_row > MAX_RESTARTS:
            raise ValueError(f'loader processes died {self.in_a_row} times in a row ({death}): '
                             f'{death.remedy}') from None
        logger.warning('a loader process died (%s): the loader is started again at %s', death, position)


def restarting_batches(make_loader: Callable[[tuple[int, int]], DataLoader], start: tuple[int, int],
                       steps_per_epoch: int, patience: float = 0.) -> Iterator[Any]:
    """The batches of an endless loader; where a loader process dies, a new loader goes on at the same batch.

    The first loader begins at once: it draws a number from torch's generator, and what is drawn afterwards,
    such as the weights of a model, follows from the seed only as long as this comes first.

    Args:
        make_loader: (epoch, step) -> a loader that begins there; equal positions give equal batches.
        start: the first position.
        steps_per_epoch: batches of an epoch.
        patience: see `watched`.
    Raises:
        ValueError: loader processes die again and again.
    """
    return _going_on(begun(make_loader(start)), make_loader, start, steps_per_epoch, patience)


def _going_on(batches: Iterator[Any] | None, make_loader: Callable[[tuple[int, int]], DataLoader],
              position: tuple[int, int], steps_per_epoch: int, patience: float) -> Iterator[Any]:
    """`batches`, which begin at `position`, and those of further loaders after a death."""
    epoch, step = position
    deaths = Deaths()
    while True:
        try:
            if batches is None:
                batches = begun(make_loader((epoch, step)))
            for batch in watched(batches, patience):
                yield batch
                deaths.in_a_row = 0
                step += 1
                if step == steps_per_epoch:
                    epoch = epoch + 1
                    step = 0
            batches = None
        except LoaderDied as death:
            deaths.count(death, f'epoch {epoch}, step {step}')
            batches = None  # its other processes end before new ones begin
