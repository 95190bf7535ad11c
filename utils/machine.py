"""What this machine grants to this process: CPUs, and memory that loader processes share with it.

A container, a batch system or `taskset` often grants a few of many CPUs, and a container little of shared
memory. Only the standard library is needed here.
"""
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = '/dev/shm'  # where loader processes put their batches
PREFETCHED = 2              # batches that every loader process holds ready, the default of torch's loader
CGROUP_TABLE = Path('/proc/self/cgroup')
CGROUP_ROOT = Path('/sys/fs/cgroup')


def local_ranks() -> int:
    """Training processes on this machine, as torchrun tells them; 1 without torchrun."""
    return max(1, int(os.environ.get('LOCAL_WORLD_SIZE') or 1))


# ---------------------------------------------------------------------------------------------- processors
def available_cpus() -> int:
    """CPUs that this process may use: those it is bound to, or fewer where a control group limits the time.

    A group that grants one and a half CPUs counts as one; the result is at least 1.
    """
    try:
        num_cpus = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # there is no such call on macOS and Windows
        num_cpus = os.cpu_count() or 1
    return max(1, int(min([num_cpus, *_cpu_quotas()])))


def _cpu_quotas() -> Iterator[float]:
    """CPUs that the control groups of this process grant, from both versions of control groups."""
    try:
        lines = CGROUP_TABLE.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, _, rest = line.partition(':')
        controllers, _, group = rest.partition(':')
        if not controllers:  # version 2 has one tree without names of controllers
            for folder in _with_parents(CGROUP_ROOT, group):
                yield from _quota(_words(folder / 'cpu.max'))
        elif 'cpu' in controllers.split(','):
            for tree in {controllers, 'cpu', 'cpu,cpuacct'}:
                for folder in _with_parents(CGROUP_ROOT / tree, group):
                    yield from _quota([*_words(folder / 'cpu.cfs_quota_us'),
                                       *_words(folder / 'cpu.cfs_period_us')])


def _with_parents(root: Path, group: str) -> Iterator[Path]:
    """The folder of a control group and those of all groups around it, whose limits hold as well.

    Inside a container the group's own folder may not be visible; `root` then stands for it.
    """
    names = [name for name in group.split('/') if name not in ('', '..')]
    for length in range(len(names), -1, -1):
        yield root.joinpath(*names[:length])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def _quota(words: list[str]) -> Iterator[float]:
    """CPUs of (microseconds granted, per so many microseconds); nothing where there is no limit."""
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
        yield int(words[0]) / int(words[1])


# ---------------------------------------------------------------------------------------------- loaders
def shared_memory_allows(num_workers: int, batch_bytes: int, num_ranks: int = 1) -> int:
    """How many of `num_workers` loader processes per rank the shared memory has room for.

    Args:
        batch_bytes: of one batch of one rank; every loader process holds two of them ready.
        num_ranks: training processes on this machine.
    Returns:
        at most `num_workers`; all of them where there is no limited shared memory.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return num_workers
    return min(num_workers, free // max(1, PREFETCHED * batch_bytes * num_ranks))


def automatic_workers(most: int, batch_bytes: int, num_cpus: int | None = None) -> int:
    """Loader processes per rank where nobody asked for a number: one CPU of each rank is left to itself.

    Args:
        most: never more than these.
        batch_bytes: see `shared_memory_allows`.
        num_cpus: of all ranks of this machine; None asks for them.
    """
    return shared_memory_allows(_wanted_workers(most, num_cpus), batch_bytes, local_ranks())


def _wanted_workers(most: int, num_cpus: int | None) -> int:
    """As many as the CPUs suggest."""
    num_cpus = available_cpus() if num_cpus is None else num_cpus
    return min(most, max(num_cpus // local_ranks() - 1, 0))


def workers_note(most: int, batch_bytes: int, num_cpus: int | None = None) -> str:
    """One line where the shared memory makes `automatic_workers` fewer than the CPUs would, else ''."""
    wanted = _wanted_workers(most, num_cpus)
    allowed = shared_memory_allows(wanted, batch_bytes, local_ranks())
    if allowed == wanted:
        return ''
    needed = PREFETCHED * batch_bytes * local_ranks() * wanted / 2 ** 20
    free = shutil.disk_usage(SHARED_MEMORY).free / 2 ** 20
    return (f'{allowed} loader processes per rank instead of {wanted}: their batches would need '
            f'{needed:,.0f} MiB of {SHARED_MEMORY}, which has {free:,.0f} MiB free; give the container more '
            '(docker run --shm-size=...), or pass --workers=N')
