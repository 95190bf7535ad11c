"""What this machine grants to this process: CPUs, memory, and memory that loader processes share with it.

A container, a batch system or `taskset` often grants only a few of the CPUs, and a container little shared
memory. This file needs the standard library alone.
"""
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = '/dev/shm'  # where loader processes put their batches
PREFETCHED = 2              # batches that every loader process holds ready, the default of torch's loader
CGROUP_TABLE = Path('/proc/self/cgroup')
CGROUP_ROOT = Path('/sys/fs/cgroup')
CPU_INFO = Path('/proc/cpuinfo')
BOOT_ID = Path('/proc/sys/kernel/random/boot_id')
PROCESS_NAMES = Path('/proc/self/ns/pid')  # a link to what tells containers apart
MEMORY_INFO = Path('/proc/meminfo')
PROCESS_STATUS = Path('/proc/self/status')
PROCESS_REFERENCES = Path('/proc/self/clear_refs')


def local_ranks() -> int:
    """Number of training processes on this machine, from torchrun; 1 without torchrun."""
    return max(1, int(os.environ.get('LOCAL_WORLD_SIZE') or 1))


def process_space() -> str:
    """A text that two processes have in common if they can see each other under /proc.

    Names of machines do not tell that: all nodes of a cluster may be called localhost.
    """
    try:
        return f'{BOOT_ID.read_text().strip()} {os.readlink(PROCESS_NAMES)}'
    except OSError:  # another system than Linux
        return f'process {os.getpid()} on {socket.gethostname()}'


# ---------------------------------------------------------------------------------------------- processors
def available_cpus() -> int:
    """Number of CPUs that this process may use, at least 1.

    These are the CPUs that it is bound to, or fewer if a control group limits their time; a group that grants
    one and a half CPUs counts as one.
    """
    try:
        num_cpus = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # there is no such call on macOS and Windows
        num_cpus = os.cpu_count() or 1
    granted = min([num_cpus, *_cpu_quotas()])
    return max(1, int(granted))


def cpu_features() -> set[str]:
    """Instruction sets of the processor under the names of Linux, such as avx2; empty on other systems."""
    return set(_of_cpu('flags', 'Features').split())  # names of x86 and of ARM


def cpu_name() -> str:
    """Name of the processor as its maker gives it; its architecture where nothing tells the name."""
    return _of_cpu('model name') or platform.machine()


def _of_cpu(*names: str) -> str:
    """A property of the first processor under the first of its names of Linux; empty on other systems."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return ''
    for line in lines:
        name, _, value = line.partition(':')
        if name.strip() in names:  # all processors of a machine are alike
            return value.strip()
    return ''


def _cpu_quotas() -> Iterator[float]:
    """CPUs that the control groups of this process grant."""
    for is_version_2, folder in _control_groups('cpu', 'cpu,cpuacct'):
        if is_version_2:
            yield from _quota(_words(folder / 'cpu.max'))
        else:
            quota = _words(folder / 'cpu.cfs_quota_us')
            period = _words(folder / 'cpu.cfs_period_us')
            yield from _quota([*quota, *period])


def _control_groups(controller: str, *trees: str) -> Iterator[tuple[bool, Path]]:
    """(whether it is of version 2, folder) of the control groups of this process that may limit something.

    Args:
        controller: what is limited, such as cpu; it has a tree of its own in version 1.
        trees: further names that this tree may have.
    """
    try:
        lines = CGROUP_TABLE.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, _, rest = line.partition(':')
        controllers, _, group = rest.partition(':')
        # Version 2 has one tree, without names of controllers.
        if not controllers:
            for folder in _with_parents(CGROUP_ROOT, group):
                yield True, folder
        elif controller in controllers.split(','):
            for tree in {controllers, controller, *trees}:
                for folder in _with_parents(CGROUP_ROOT / tree, group):
                    yield False, folder


def _with_parents(root: Path, group: str) -> Iterator[Path]:
    """The folder of a control group and those of all groups around it, whose limits hold as well.

    Inside a container the group's own folder may not be visible; `root` then stands for it.
    """
    names = [name for name in group.split('/') if name not in ('', '..')]
    for length in range(len(names), -1, -1):
        yield root.joinpath(*names[:length])


def _words(path: Path) -> list[str]:
    """The words in a small file; [] if it cannot be read."""
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def _quota(words: list[str]) -> Iterator[float]:
    """The CPUs that a limit grants, if there is one; its words are (granted, period) in microseconds."""
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
        yield int(words[0]) / int(words[1])


# ---------------------------------------------------------------------------------------------- memory
def free_memory() -> int | None:
    """Bytes of memory that the processes of this machine may still take; None where nothing tells.

    This is what the system calls available, or less if a control group limits this process. Files that the
    system only keeps for later reads count as free.
    """
    free = [*_available_memory(), *_memory_left_by_groups()]
    return max(0, min(free)) if free else None


def _available_memory() -> Iterator[int]:
    """What the machine itself has available."""
    available = _bytes_in(MEMORY_INFO, 'MemAvailable:')
    if available is not None:
        yield available


def _bytes_in(table: Path, name: str) -> int | None:
    """The number of kB behind a name in a table of Linux, in bytes; None if it is not there."""
    words = _words(table)
    if name not in words[:-1]:
        return None
    return int(words[words.index(name) + 1]) * 1024


def _memory_left_by_groups() -> Iterator[int]:
    """What each control group of this process leaves of its limit."""
    for is_version_2, folder in _control_groups('memory'):
        names = ('memory.max', 'memory.current', 'inactive_file')
        if not is_version_2:
            names = ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file')
        limit_name, used_name, kept_name = names
        limit = _words(folder / limit_name)
        used = _words(folder / used_name)
        if not (limit and used and limit[0].isdigit() and used[0].isdigit()):
            continue
        statistics = _words(folder / 'memory.stat')
        kept = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(kept_name, '0')
        yield int(limit[0]) - int(used[0]) + int(kept)


def process_memory() -> int | None:
    """Bytes of memory that this process has now; None on other systems than Linux."""
    return _bytes_in(PROCESS_STATUS, 'VmRSS:')


def peak_memory() -> int | None:
    """Most bytes that this process has had since `forget_peak_memory`; None on other systems than Linux."""
    return _bytes_in(PROCESS_STATUS, 'VmHWM:')


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew; where the system refuses that, it goes on as it was."""
    with suppress(OSError):
        PROCESS_REFERENCES.write_text('5')  # see proc_pid_clear_refs(5)


# ---------------------------------------------------------------------------------------------- loaders
def shared_memory_allows(num_workers: int, batch_bytes: int, num_ranks: int = 1) -> int:
    """The number of loader processes per rank, out of `num_workers`, that shared memory has room for.

    Args:
        num_workers: loader processes per rank that are wanted.
        batch_bytes: size of a batch of one rank; every loader process holds two batches ready.
        num_ranks: training processes on this machine.
    Returns:
        At most `num_workers`; all of them where shared memory has no limit of its own.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return num_workers
    bytes_per_worker = PREFETCHED * batch_bytes * num_ranks  # of the same worker on every rank
    return min(num_workers, free // max(1, bytes_per_worker))


def automatic_workers(most: int, batch_bytes: int, num_cpus: int | None = None) -> int:
    """Number of loader processes per rank if the user gives none: one per CPU, but for one CPU per rank.

    Args:
        most: an upper limit.
        batch_bytes: see `shared_memory_allows`.
        num_cpus: CPUs for all ranks of this machine; None takes `available_cpus`.
    """
    wanted = _wanted_workers(most, num_cpus)
    return shared_memory_allows(wanted, batch_bytes, local_ranks())


def _wanted_workers(most: int, num_cpus: int | None) -> int:
    """Number of loader processes per rank that the CPUs suggest, whatever the shared memory allows."""
    if num_cpus is None:
        num_cpus = available_cpus()
    cpus_per_rank = num_cpus // local_ranks()
    return min(most, max(cpus_per_rank - 1, 0))


def workers_note(most: int, batch_bytes: int, num_cpus: int | None = None) -> str:
    """A line for the log if `automatic_workers` are fewer for want of shared memory, else ''."""
    wanted = _wanted_workers(most, num_cpus)
    allowed = shared_memory_allows(wanted, batch_bytes, local_ranks())
    if allowed == wanted:
        return ''
    needed = PREFETCHED * batch_bytes * local_ranks() * wanted / 2 ** 20
    free = shutil.disk_usage(SHARED_MEMORY).free / 2 ** 20
    return (f'{allowed} loader processes per rank instead of {wanted}: their batches would need '
            f'{needed:,.0f} MiB of {SHARED_MEMORY}, which has {free:,.0f} MiB free; give the container more '
            '(docker run --shm-size=...), or pass --workers=N')
