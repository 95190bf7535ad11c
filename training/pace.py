"""How fast each rank is by itself, since the slowest one sets the pace of all.

Gradients are averaged over all ranks, so the steps of every rank last as long as those of the slowest one. A
rank's own time is that of its steps without the time in which it waits for other ranks, at the end of the
backward pass and of the step. With sharded weights ranks wait for each other all the way through, so that
their times hardly differ.
"""
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import dist
from models.base import Stopwatch


class Slowest(NamedTuple):
    """The rank whose own part of the steps takes longest."""
    rank: int
    host: str
    seconds: float  # per step
    data: float     # share of these seconds that it waits for data

    def __str__(self) -> str:
        return f'{self.seconds:.3f} (data {self.data:.0%}, rank {self.rank} on {self.host})'


class Pace:
    """Time of this rank's steps, compared over all ranks now and then; every rank makes one.

    Args:
        waiting: runs while this rank waits for others.
    Attributes:
        hosts: name of the host of every rank.
        slowest: of the last comparison; None before it, and without other ranks.
        peak_memory: largest memory in GiB that tensors of any rank have had; None on a CPU.
    """

    def __init__(self, waiting: Stopwatch):
        self.waiting = waiting
        self.hosts: list[str] = dist.allgather_object(dist.host_name())
        self.slowest: Slowest | None = None
        self.peak_memory: float | None = None
        self._began = time.perf_counter()
        self._data_seconds = 0.
        self._own_seconds = 0.
        self._num_steps = 0

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; a step begins where its batch is asked for."""
        while True:
            self._began = time.perf_counter()
            batch = next(batches)
            self._data_seconds += time.perf_counter() - self._began
            yield batch

    def end_step(self) -> None:
        """Note that a step is done. All ranks have just met, so that nothing has to wait for a GPU here."""
        self._own_seconds += time.perf_counter() - self._began - self.waiting.take()
        self._num_steps += 1

    def compare(self) -> None:
        """Find the slowest rank over the steps since the last call; every rank calls it."""
        own_seconds = max(self._own_seconds, 1e-9)
        device = dist.get_device()
        memory = torch.cuda.max_memory_allocated(device) / 2 ** 30 if device.type == 'cuda' else 0.
        per_step = own_seconds / max(self._num_steps, 1)
        own = torch.tensor([[per_step, self._data_seconds / own_seconds, memory]], dtype=torch.float64,
                           device=device)
        of_ranks = dist.allgather(own).tolist()
        if device.type == 'cuda':
            self.peak_memory = max(memory for _, _, memory in of_ranks)
        if self._num_steps and len(of_ranks) > 1:
            rank = max(range(len(of_ranks)), key=lambda rank: of_ranks[rank][0])
            seconds, data, _ = of_ranks[rank]
            self.slowest = Slowest(rank, self.hosts[rank], seconds, min(data, 1.))
        self._data_seconds = 0.
        self._own_seconds = 0.
        self._num_steps = 0

    def for_line(self) -> list[str]:
        """What the progress line says of it."""
        parts = []
        if self.peak_memory is not None:
            parts.append(f'memory: {self.peak_memory:.1f} GiB')
        if self.slowest:
            parts.append(f'slowest: {self.slowest}')
        return parts

    def for_json(self) -> dict[str, Any]:
        """What steps.jsonl says of it."""
        values: dict[str, Any] = {}
        if self.peak_memory is not None:
            values['memory_gib'] = self.peak_memory
        if self.slowest:
            values |= {f'slowest_{name}': value for name, value in self.slowest._asdict().items()}
        return values
