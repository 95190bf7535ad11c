"""Process group, rank, device and collectives; every call also works without torchrun and on CPU (gloo).

Without an initialised group: rank 0, world size 1, and collectives hand their input back.
"""
import datetime
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as tdist
import torch.multiprocessing as mp

_device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def initialized() -> bool:
    return tdist.is_available() and tdist.is_initialized()


def initialize(fork: bool = False, backend: str | None = None, gpu_id_if_not_distibuted: int = 0,
               timeout: int = 30) -> None:
    """Join the group torchrun describes in the environment; without torchrun only choose the device.

    Args:
        fork: start worker processes by 'fork' instead of the platform's way.
        backend: 'nccl' or 'gloo'; None takes nccl when CUDA is there, else gloo. Asked for gloo, no
            rank claims a GPU.
        gpu_id_if_not_distibuted: CUDA device of a run without torchrun (upstream's spelling).
        timeout: minutes a collective may wait.
    """
    if 'RANK' not in os.environ:
        if torch.cuda.is_available():
            set_gpu_id(gpu_id_if_not_distibuted)
        return
    if fork:
        mp.set_start_method('fork', force=True)
    if torch.cuda.is_available() and backend != 'gloo':
        set_gpu_id(get_local_rank())
    tdist.init_process_group(backend or ('nccl' if torch.cuda.is_available() else 'gloo'),
                             timeout=datetime.timedelta(minutes=timeout))


def get_rank() -> int:
    return tdist.get_rank() if initialized() else 0


def get_local_rank() -> int:
    return int(os.environ.get('LOCAL_RANK', 0))


def get_world_size() -> int:
    return tdist.get_world_size() if initialized() else 1


def get_device() -> torch.device:
    return _device


def set_gpu_id(gpu_id: int) -> None:
    global _device
    _device = torch.device('cuda', gpu_id)
    torch.cuda.set_device(_device)


def is_master() -> bool:
    return get_rank() == 0


def is_local_master() -> bool:
    return get_local_rank() == 0


def new_group(ranks: list[int]):
    return tdist.new_group(ranks=ranks) if initialized() else None


def barrier() -> None:
    if initialized():
        tdist.barrier()


def allreduce(t: torch.Tensor, async_op: bool = False):
    """Sum over ranks, in place; the work handle when `async_op`, else None."""
    if initialized():
        return tdist.all_reduce(t, async_op=async_op)
    return None


def allgather(t: torch.Tensor, cat: bool = True) -> torch.Tensor | list[torch.Tensor]:
    """Tensors of equal shape from every rank, concatenated along dim 0 or as a list in rank order."""
    if not initialized():
        return t if cat else [t]
    parts = [torch.empty_like(t) for _ in range(get_world_size())]
    tdist.all_gather(parts, t.contiguous())
    return torch.cat(parts) if cat else parts


def allgather_diff_shape(t: torch.Tensor, cat: bool = True) -> torch.Tensor | list[torch.Tensor]:
    """As `allgather`, for tensors that differ in dim 0: padded to the longest, cut after the exchange."""
    if not initialized():
        return t if cat else [t]
    lengths = allgather(torch.tensor([len(t)], device=t.device)).tolist()
    padded = t.new_zeros(max(lengths), *t.shape[1:])
    padded[:len(t)] = t
    parts = [part[:length] for part, length in zip(allgather(padded, cat=False), lengths, strict=True)]
    return torch.cat(parts) if cat else parts


def allgather_object(value: Any) -> list[Any]:
    """One picklable value per rank, in rank order."""
    if not initialized():
        return [value]
    values = [None] * get_world_size()
    tdist.all_gather_object(values, value)
    return values


def first_of_node_first(make: Callable[[bool], Any]) -> Any:
    """`make(True)` on the first process of every node, then `make(False)` on the others; every rank calls it.

    What the first one downloads, the others then find.

    Raises:
        ValueError: what `make` raised on any rank, so that no rank goes on alone.
    """
    value, failure = None, None
    for is_first in (True, False):
        if is_local_master() == is_first:
            try:
                value = make(is_first)
            except ValueError as error:
                failure = error
        barrier()
    for of_a_rank in filter(None, allgather_object(failure)):
        raise of_a_rank
    return value


def broadcast(t: torch.Tensor, src_rank: int) -> None:
    if initialized():
        tdist.broadcast(t, src=src_rank)


def dist_fmt_vals(val: float, fmt: str | None = '%.2f') -> torch.Tensor | list[str]:
    """One value per rank: formatted strings, or the raw float tensor when `fmt` is None."""
    values = allgather(torch.tensor([float(val)], device=_device))
    return values if fmt is None else [fmt % v for v in values.tolist()]


def _only_if(condition, synchronise: bool):
    def decorate(func):
        @functools.wraps(func)
        def wrapper(*args, **kwargs):
            force = kwargs.pop('force', False)
            result = func(*args, **kwargs) if force or condition() else None
            if synchronise:
                barrier()
            return result
        return wrapper
    return decorate


def master_only(func):
    """Run on global rank 0 (or with `force=True`); the other ranks wait and get None."""
    return _only_if(is_master, synchronise=True)(func)


def local_master_only(func):
    """Run on rank 0 of every node (or with `force=True`); the other ranks wait and get None."""
    return _only_if(is_local_master, synchronise=True)(func)


def for_visualize(func):
    """Run on global rank 0 only, without waiting."""
    return _only_if(is_master, synchronise=False)(func)


def finalize() -> None:
    if initialized():
        tdist.destroy_process_group()
