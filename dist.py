"""Process group, rank, device and collectives; every call also works without torchrun and on CPU (gloo).

Without an initialised group the rank is 0, the world size 1, and collectives return their input.
"""
import ctypes
import datetime
import functools
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as tdist
import torch.multiprocessing as mp

LONGEST_VALUE = 300  # letters of a value in a message
FIRST_PORT = 15_000  # of the ports at which tasks of srun meet, below those that Linux gives away by itself
NUM_PORTS = 15_000
_device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def initialized() -> bool:
    """Whether this process has joined a group."""
    return tdist.is_available() and tdist.is_initialized()


def initialize(fork: bool = False, backend: str | None = None, gpu_id_if_not_distibuted: int = 0,
               timeout: int = 30) -> None:
    """Join the group that torchrun or srun describes in the environment; without them choose the device.

    Args:
        fork: start worker processes by 'fork' instead of the platform's way.
        backend: 'nccl' or 'gloo'; None takes nccl if there is CUDA, else gloo. With an explicit 'gloo' no
            rank claims a GPU.
        gpu_id_if_not_distibuted: CUDA device of a run without torchrun (upstream's spelling).
        timeout: minutes a collective may wait.
    Raises:
        ValueError: the launcher's variables are incomplete, its port is taken, or srun started several
            processes that know nothing of each other.
    """
    is_task = 'RANK' not in os.environ and _take_over_slurm()
    if 'RANK' not in os.environ:
        if torch.cuda.is_available():
            set_gpu_id(gpu_id_if_not_distibuted)
        return
    _check_launcher_variables()
    _end_with_launcher()
    if fork:
        mp.set_start_method('fork', force=True)
    backend = backend or ('nccl' if torch.cuda.is_available() else 'gloo')
    device_id = None
    if torch.cuda.is_available() and backend != 'gloo':
        # `srun --gpus-per-task=1` shows every task a single GPU, its own.
        has_own_gpu = is_task and torch.cuda.device_count() == 1
        set_gpu_id(0 if has_own_gpu else get_local_rank())
        device_id = _device
    address = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
    world_size = int(os.environ['WORLD_SIZE'])
    if 'TORCHELASTIC_RUN_ID' not in os.environ and not is_task and world_size > 1:
        # torchrun starts all processes itself. If these variables were set by hand, or are left over from the
        # launcher of a cluster, the other processes may never come, and this one would wait in silence.
        sys.stderr.write(f'waiting for {world_size} processes at {address}, as RANK and WORLD_SIZE say; '
                         'unset both to run a single process\n')
    try:
        # A group that knows its device connects at once, so that a broken network is named here.
        tdist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout), device_id=device_id)
    except RuntimeError as error:  # torch's own kinds of network errors among them
        reason = ' '.join(str(error).split())
        if 'EADDRINUSE' in reason or 'address already in use' in reason.lower():
            raise ValueError(f'the port of {address} is taken by another program: pass another '
                             '--master_port, or --standalone on a single machine') from None
        raise ValueError(f'cannot join the {world_size} processes at {address} ({reason[:300]}): check that '
                         'all of them were started, and that MASTER_ADDR and MASTER_PORT are those of '
                         'rank 0') from None


def _take_over_slurm() -> bool:
    """Set the variables of a launcher where srun itself has started a process per rank.

    Returns:
        Whether this process is such a task; False outside of Slurm, and for a single task.
    Raises:
        ValueError: there are several tasks, and Slurm's variables do not tell where they meet. Each of them
            would be a training of its own, and all would do the same.
    """
    num_tasks = os.environ.get('SLURM_STEP_NUM_TASKS', '1')
    if not num_tasks.isdecimal() or int(num_tasks) < 2:
        return False
    names = ('SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_JOB_ID')
    numbers = [os.environ.get(name, '') for name in names]
    host = _first_host(os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_JOB_NODELIST', ''))
    if not host or not all(number.isdecimal() for number in numbers):
        raise ValueError(
            f'srun started {num_tasks} processes that know nothing of each other: start one torchrun per '
            'node (srun --ntasks-per-node=1 torchrun ...), or export RANK=$SLURM_PROCID, '
            'LOCAL_RANK=$SLURM_LOCALID, WORLD_SIZE=$SLURM_NTASKS, MASTER_ADDR and MASTER_PORT in each')
    rank, local_rank, job = numbers
    step = os.environ.get('SLURM_STEP_ID', '')
    offset = int(job) + (int(step) if step.isdecimal() else 0)  # two steps of a job have two ports
    os.environ.setdefault('MASTER_ADDR', host)
    os.environ.setdefault('MASTER_PORT', str(FIRST_PORT + offset % NUM_PORTS))
    os.environ.update(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=num_tasks)
    os.environ.setdefault('LOCAL_WORLD_SIZE', str(_tasks_of_this_node()))
    return True


def _first_host(hosts: str) -> str:
    """The first host of a list as Slurm writes it, such as 'node[07-09],gpu3'; '' if that is unknown."""
    if not re.search(r'[\[,]', hosts):
        return hosts
    try:
        done = subprocess.run(['scontrol', 'show', 'hostnames', hosts], capture_output=True, text=True,
                              check=True)
    except (OSError, subprocess.CalledProcessError):  # in a container without Slurm's programs
        return ''
    return done.stdout.partition('\n')[0].strip()


def _tasks_of_this_node() -> int:
    """Number of tasks that srun has started on this node, by a list such as '8(x3),4'; 1 if unknown."""
    tasks_per_node = os.environ.get('SLURM_STEP_TASKS_PER_NODE', '')
    counts: list[int] = []
    for count, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', tasks_per_node):
        counts += [int(count)] * int(times or 1)
    node = os.environ.get('SLURM_NODEID', '0')
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else 1


def _check_launcher_variables() -> None:
    """Make sure that the variables of a launcher are complete, and fit together."""
    missing = [name for name in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if missing:
        raise ValueError(f'RANK={os.environ["RANK"]} is set, but not {" and ".join(missing)}: start by '
                         'torchrun, which sets all of them, or unset RANK to run a single process')
    numbers = {name: os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'MASTER_PORT')}
    wrong = [f'{name}={value!r}' for name, value in numbers.items() if not value.isdecimal()]
    if wrong:
        raise ValueError(f'expected numbers from the launcher, got {", ".join(wrong)}: start by torchrun, or '
                         'unset RANK to run a single process')
    if int(numbers['RANK']) >= int(numbers['WORLD_SIZE']):
        raise ValueError(f'expected RANK below WORLD_SIZE={numbers["WORLD_SIZE"]}, got RANK='
                         f'{numbers["RANK"]}: these variables are of two launchers; unset them, or start by '
                         'torchrun')


def _end_with_launcher() -> None:
    """Ask Linux to send SIGTERM to this process when its launcher dies.

    A rank that outlives its launcher goes on training, holds the lock of the output folder, and nobody sees
    it.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    launcher = os.getppid()
    try:
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    except (OSError, AttributeError, TypeError):  # another system than Linux
        return
    if os.getppid() != launcher:  # it died before it was watched
        os.kill(os.getpid(), signal.SIGTERM)


def get_rank() -> int:
    """Number of this process among all of them, from 0 on."""
    return tdist.get_rank() if initialized() else 0


def get_local_rank() -> int:
    """Number of this process among those of its node, from 0 on."""
    return int(os.environ.get('LOCAL_RANK', 0))


def get_world_size() -> int:
    """Number of processes in all."""
    return tdist.get_world_size() if initialized() else 1


def get_device() -> torch.device:
    """The device of this process."""
    return _device


def set_gpu_id(gpu_id: int) -> None:
    """Make a CUDA device the device of this process."""
    global _device
    _device = torch.device('cuda', gpu_id)
    torch.cuda.set_device(_device)


def is_master() -> bool:
    """Whether this is the first process of all."""
    return get_rank() == 0


def is_local_master() -> bool:
    """Whether this is the first process of its node."""
    return get_local_rank() == 0


def host_name() -> str:
    """Name of this machine, for messages of several nodes."""
    return socket.gethostname()


def new_group(ranks: list[int]):
    """A group of some of the ranks; None without an initialised group."""
    return tdist.new_group(ranks=ranks) if initialized() else None


def barrier() -> None:
    """Wait until every process has come to this point."""
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


def raise_together(failure: ValueError | OSError | None) -> None:
    """Raise the error of one rank on all of them, so that no rank goes on alone; every rank calls it.

    Args:
        failure: the error of this rank, or None.
    Raises:
        ValueError, OSError: the error of the first rank that has one.
    """
    failures = allgather_object((host_name(), failure))
    for rank, (host, error) in enumerate(failures):
        if error is None:
            continue
        # People read the message of rank 0, which must say where the error was.
        if rank > 0 and rank != get_rank():
            raise type(error)(f'rank {rank} on {host}: {error}') from None
        raise error


def require_equal(value: Any, what: str, remedy: str) -> None:
    """Make sure that all ranks have the same `value`; every rank calls it.

    Args:
        value: anything picklable that can be compared and printed.
        what: a name of the value, for the message.
        remedy: what to do if ranks differ.
    Raises:
        ValueError: a rank has another value than rank 0, on every rank.
    """
    values = allgather_object((host_name(), value))
    first_host, expected = values[0]
    for rank, (host, other) in enumerate(values):
        if other != expected:
            ours, theirs = what_differs(expected, other)
            raise ValueError(f'{what} differs between ranks: rank 0 on {first_host} has {ours}, rank '
                             f'{rank} on {host} has {theirs}: {remedy}')


def what_differs(a: Any, b: Any) -> tuple[str, str]:
    """The first part in which two values differ, as texts that are short enough for a line of a log."""
    if isinstance(a, dict) and isinstance(b, dict):
        equal = {key for key in a.keys() & b.keys() if a[key] == b[key]}
        a = {key: value for key, value in a.items() if key not in equal}
        b = {key: value for key, value in b.items() if key not in equal}
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        shorter = min(len(a), len(b))
        first = next((i for i in range(shorter) if a[i] != b[i]), shorter)
        if first < shorter:
            return what_differs(a[first], b[first])

        # One is the beginning of the other.
        texts = [f'{len(one)} entries, the last one {str(one[-1:])[:LONGEST_VALUE]}' for one in (a, b)]
        return texts[0], texts[1]
    return str(a)[:LONGEST_VALUE], str(b)[:LONGEST_VALUE]


def from_master(make: Callable[[], Any]) -> Any:
    """The value of `make()` on global rank 0, for every rank; every rank calls it.

    Args:
        make: is called on rank 0 alone; its value must be picklable.
    Raises:
        ValueError, OSError: the error of `make`, on every rank.
    """
    value = None
    failure = None
    if is_master():
        try:
            value = make()
        except (ValueError, OSError) as error:
            failure = error
    raise_together(failure)
    return allgather_object(value)[0]


def first_of_node_first(make: Callable[[bool], Any]) -> Any:
    """`make(True)` on the first process of every node, then `make(False)` on the other ones.

    Files that the first process downloads are there when the other ones look for them. Every rank calls it.

    Raises:
        ValueError: the error of `make` on any rank, so that no rank goes on alone.
    """
    value = None
    failure = None
    for is_first in (True, False):
        if is_local_master() == is_first:
            try:
                value = make(is_first)
            except ValueError as error:
                failure = error
        barrier()
    raise_together(failure)
    return value


def sum_over_ranks(*numbers: float) -> list[float]:
    """Each number summed over all ranks; every rank calls it, and waits for its device once."""
    total = torch.tensor(numbers, dtype=torch.float64, device=_device)
    allreduce(total)
    return total.tolist()


def broadcast(t: torch.Tensor, src_rank: int) -> None:
    """Overwrite `t` on every rank by that of one rank; every rank calls it."""
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
    """Leave the group."""
    if initialized():
        tdist.destroy_process_group()
