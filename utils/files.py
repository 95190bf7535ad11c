"""Files of any kind: written whole or not at all, and folders that one run at a time may write into."""
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

logger = logging.getLogger(__name__)

HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what lockf raises there
SUFFIXES = ('.png', '.jpg', '.jpeg')  # of the images of a set
MAX_JSON_BYTES = 2 ** 28  # a list of 50,000 labels has 300 kB


# ---------------------------------------------------------------------------------------------- writing
@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `target` that replaces it when the block ends well, and vanishes otherwise.

    Raises:
        OSError: the disk is full or the folder not writable; the error names the path.
    """
    target = Path(target)
    temporary = target.with_name(f'.{target.name}.tmp')
    try:
        # What a killed run has left may have a second name by now; writing into it would change that file,
        # too.
        temporary.unlink(missing_ok=True)
        yield temporary
        with temporary.open('rb') as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # A failed write does not know the name of its file.
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a small file whole or not at all.

    Raises:
        OSError: the disk is full or not writable; what was at `path` before is intact.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def sync_folder(folder: str | os.PathLike) -> None:
    """Make renames in a folder survive a power cut, as far as the file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, in place of what has that name; a copy where links are refused."""
    with atomic_path(target) as second_name:
        second_name.unlink(missing_ok=True)
        try:
            os.link(source, second_name)
        except OSError:
            with source.open('rb') as content, second_name.open('wb') as copy:
                while block := content.read(1 << 24):
                    copy.write(block)


# ---------------------------------------------------------------------------------------------- reading
def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds no JSON object; the message tells only what is wrong with it.
    """
    try:
        with Path(path).open('rb') as file:
            if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
                raise ValueError(f'it is larger than {MAX_JSON_BYTES:,} bytes')
            content = json.loads(file.read())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except RecursionError:
        raise ValueError('its lists are nested too deeply') from None
    if not isinstance(content, dict):
        raise ValueError(f'it holds a {type(content).__name__} instead of a JSON object')
    return content


# ---------------------------------------------------------------------------------------------- locks
def lock_folder(folder: str | os.PathLike) -> IO:
    """Claim an output folder for this process, until the returned file is closed or the process ends.

    The file `.lock` in it tells which process that is. Closing any other descriptor of this file in the same
    process would give the claim up, so that nobody may open it meanwhile.

    Raises:
        ValueError: another process on this file system holds it, or it cannot be written.
    """
    path = Path(folder) / '.lock'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The holder's name must stay until the lock is ours, so that the file is not truncated here.
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), 'r+b')
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        if not take_lock(lock, folder, wait=False):
            raise ValueError(f'{str(folder)!r} is in use by {_holder(lock)}: wait for it, stop all its '
                             'processes, or pass another output folder')
        now = time.strftime('%Y-%m-%d %H:%M:%S')
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on host {socket.gethostname()} since {now}\n'.encode())
        lock.flush()
    except OSError as error:
        lock.close()
        raise _not_writable(folder, error) from None
    except ValueError:
        lock.close()
        raise
    return lock


def take_lock(lock: IO, name: str | os.PathLike, wait: bool) -> bool:
    """Lock an open file against other processes; False if one of them holds it and nobody waits.

    Args:
        name: of what the lock protects, for the warning where the file system knows no locks. There the
            caller goes on without: better two runs that must not meet than no run at all.
    Raises:
        OSError: reading or writing failed for another reason.
    """
    if fcntl is None:
        _warn_of_no_locks(name, 'not on this system')
        return True
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in HAS_NO_LOCKS:
            raise
        _warn_of_no_locks(name, error.strerror)
    return True


def _warn_of_no_locks(name: str | os.PathLike, reason: str) -> None:
    """Say that nothing keeps two runs apart."""
    logger.warning('the file system of %r has no locks (%s): two runs that write there at once would not '
                   'be noticed, so make sure that there is one', str(name), reason)


def _holder(lock: IO) -> str:
    """What the process that holds a lock has written of itself."""
    try:
        line = lock.read(200).decode().strip()
    except (OSError, ValueError):
        line = ''
    return line if line.startswith('process ') and line.isprintable() else 'another run'


def _not_writable(folder: str | os.PathLike, error: OSError) -> ValueError:
    return ValueError(f'cannot write to the output folder {str(folder)!r} ({error.strerror}): '
                      'pass another one, change its permissions, or free some space')
