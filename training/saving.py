"""Checkpoints written in the background: the state is copied to host memory, and a thread writes the copy.

So a training waits for the copy alone, and not for the disk. What is on the disk is always whole: the thread
writes beside the last good file, and renames. One save is under way at a time; the next one waits for it.
"""
import copy
import logging
import os
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from utils.checkpoint import require_finite, write_checkpoint
from utils.files import link_or_copy

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a training; a context that ends when the last one is on the disk.

    The first rank calls `save` and `wait`; on the other ranks nothing ever happens.

    Args:
        folder: of the checkpoints.
        prefix: begins the names of the files.
        in_background: whether the training goes on while a thread writes.
        keep_newest: see `write_checkpoint`.
        keep_every: a checkpoint after a multiple of so many optimizer steps is kept for good; 0 keeps none.
        command: a shell command that is run after every save, in an environment with CHECKPOINT, a path, and
            STEP, the number of optimizer steps that are done; '' runs none.
    """

    def __init__(self, folder: Path, prefix: str, in_background: bool = True, keep_newest: int = 2,
                 keep_every: int = 0, command: str = ''):
        self.folder = folder
        self.prefix = prefix
        self.in_background = in_background
        self.keep_newest = keep_newest
        self.keep_every = keep_every
        self.command = command
        self._to_host = HostCopy()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._running: subprocess.Popen | None = None  # the command of the last save

    def __enter__(self) -> 'CheckpointWriter':
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._join()
        self._end_command()

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written; `wait` tells why."""
        return self._failure is not None

    def save(self, state: dict[str, Any], step: int, is_best: bool = False) -> None:
        """Save a checkpoint, in the background where that is asked for.

        Args:
            state: what the file holds; it may change as soon as this call is over.
            step: number of optimizer steps that are done.
            is_best: whether this is the best checkpoint so far.
        Raises:
            OSError: this checkpoint or the one before it could not be written; older files are intact.
            ValueError: a tensor of the state holds nan or an infinite number; nothing is written.
        """
        begin = time.perf_counter()
        self.wait()
        require_finite(state)
        if not self.in_background:
            self._write(state, step, is_best, begin)
            self.wait()
            return

        # From here on the training may change its weights: the thread has copies of its own.
        state = self._to_host(state)
        paused = time.perf_counter() - begin
        self._thread = threading.Thread(target=self._write, args=(state, step, is_best, begin, paused),
                                        name='checkpoint')
        self._thread.start()

    def mark_best(self) -> None:
        """Give the last checkpoint the name `-best`, too.

        Raises:
            OSError: the last one could not be written.
        """
        self.wait()
        link_or_copy(self.folder / f'{self.prefix}-last.pth', self.folder / f'{self.prefix}-best.pth')

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: it could not be written; older files are intact.
        """
        self._join()
        failure = self._failure
        self._failure = None
        if failure:
            raise failure

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
        self._thread = None

    def _write(self, state: dict[str, Any], step: int, is_best: bool, begin: float,
               paused: float | None = None) -> None:
        """Write a checkpoint and start the command; an error is told at once, and raised by `wait`."""
        is_kept = self.keep_every > 0 and step % self.keep_every == 0
        try:
            write_checkpoint(state, self.folder, self.prefix, is_best, self.keep_newest,
                             kept_step=step if is_kept else None)
        except Exception as error:  # whatever it is, the training must hear of it
            logger.error('the checkpoint of step %d is lost: %s', step, error)
            self._failure = error
            return
        seconds = time.perf_counter() - begin
        path = self.folder / f'{self.prefix}-last.pth'
        logger.info('saved %r at step %d: %.1f MB, the training waited %.2f s, all took %.2f s', path.name,
                    step, path.stat().st_size / 1e6, seconds if paused is None else paused, seconds)
        if self.command:
            self._run_command(path, step)

    def _run_command(self, path: Path, step: int) -> None:
        """Start the command that follows a save; nobody waits for it until the training ends."""
        if self._running and self._running.poll() is None:
            logger.warning('--after_save still runs for an earlier checkpoint, so it is left out at step %d',
                           step)
            return
        self._end_command()

        # The next save takes the name of the file away, so that the command gets a name of its own.
        link_or_copy(path, self._path_of_command)
        variables = {**os.environ, 'CHECKPOINT': str(self._path_of_command.absolute()), 'STEP': str(step)}
        self._running = subprocess.Popen(self.command, shell=True, env=variables, start_new_session=True)

    @property
    def _path_of_command(self) -> Path:
        """The name under which the command finds the checkpoint; a start removes it after a kill."""
        return self.folder / f'.{self.prefix}-saved.pth.tmp'

    def _end_command(self) -> None:
        """Wait for the command of the last save, and say whether it failed."""
        if self._running is None:
            return
        code = self._running.wait()
        self._running = None
        self._path_of_command.unlink(missing_ok=True)
        if code:
            logger.warning('--after_save=%r ended with exit code %d', self.command, code)


class HostCopy:
    """Copies nested dicts and lists, with their tensors in host memory.

    The memory of a copy is used again by the next one, so that only one copy may be in use at a time. From a
    GPU it is pinned memory, into which all copies are under way at once.
    """

    def __init__(self):
        self._buffers: dict[str, torch.Tensor] = {}  # by the dotted name of the tensor
        self._copied: dict[tuple, torch.Tensor] = {}  # by the memory of the original, in this copy

    @torch.no_grad()
    def __call__(self, tree: Any) -> Any:
        """A copy of the tree, which is complete when this call is over."""
        self._copied.clear()
        copied = self._copy(tree, '')
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, tree: Any, name: str) -> Any:
        if isinstance(tree, torch.Tensor):
            return self._copy_tensor(tree, name)
        if isinstance(tree, dict):
            # A shallow copy keeps the kind of the dict, and what torch notes on a dict of weights.
            copied = copy.copy(tree)
            for key, value in tree.items():
                copied[key] = self._copy(value, f'{name}.{key}')
            return copied
        if isinstance(tree, list | tuple):
            return type(tree)([self._copy(value, f'{name}.{i}') for i, value in enumerate(tree)])
        return copy.deepcopy(tree)

    def _copy_tensor(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The copy of a tensor; weights that have two names stay one tensor."""
        memory = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() and memory in self._copied:
            return self._copied[memory]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(tensor, non_blocking=True)
        self._copied[memory] = buffer
        return buffer
