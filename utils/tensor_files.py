"""Files of tensors: our own files are signed, and files of other programs are read without running any code.

A signed file is an ordinary file of `torch.save`, which is a zip archive, with the SHA-256 of its bytes as
the comment of the archive. Other programs read it as before, and this one notices every changed bit.
"""
import hashlib
import logging
import os
import re
import socket
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

import dist
from utils.files import atomic_path, sync_folder

logger = logging.getLogger(__name__)

BLOCK = 1 << 20                      # bytes that are hashed at once
END_OF_ZIP = b'PK\5\6'               # first bytes of the last record of a zip, which the comment follows
END_SIZE = 22                        # bytes of that record; its last two are the length of the comment
SIGNATURE = b'sha256:'
SIGNATURE_SIZE = len(SIGNATURE) + 64
ATTEMPTS = 10                        # tries to read a file that somebody else replaces meanwhile
DOWNLOAD_AGAIN = 'copy or download it again'


class UnusableFile(ValueError):
    """The content of a file cannot be used: it is damaged, or no file of weights.

    Reading the file again changes nothing, unlike after errors of a disk or a network.
    """


class Identity(NamedTuple):
    """What tells a file from another file that has taken its name."""
    inode: int
    size: int
    changed_ns: int


def identity_of(path: str | os.PathLike) -> Identity:
    """The identity of a regular file that is not empty.

    The file is not opened, since opening a pipe would block for ever.

    Raises:
        FileNotFoundError: there is nothing at this path.
        UnusableFile: there is something else than a regular file, or an empty one.
        ValueError: the file system refuses to say.
    """
    name = repr(os.fspath(path))
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise UnusableFile(f'{name} cannot be read: it is a link to nothing') from None
        raise FileNotFoundError(f'expected a checkpoint file, found nothing at {name}: check the '
                                'path') from None
    except OSError as error:
        if os.path.islink(path) and 'symbolic links' in str(error.strerror):
            raise UnusableFile(f'{name} cannot be read: it is a link that leads back to itself') from None
        raise _no_access(path, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise UnusableFile(f'{name} cannot be read: it is a folder, expected a file')
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFile(f'{name} cannot be read: it is a pipe, socket or device, expected a file')
    if status.st_size == 0:
        raise UnusableFile(f'{name} cannot be read: it is damaged, since it is empty; {DOWNLOAD_AGAIN}')
    return Identity(status.st_ino, status.st_size, status.st_mtime_ns)


def _no_access(path: str | os.PathLike, error: OSError) -> ValueError:
    """The error for a path where the file system is at fault, and not the file."""
    remedy = 'check the disk or the network, and run the same command again'
    if isinstance(error, PermissionError):
        remedy = 'make the file readable for this user, and run the same command again'
    return ValueError(f'{os.fspath(path)!r} cannot be opened or read ({error.strerror or error}): {remedy}')


# ---------------------------------------------------------------------------------------------- writing
class _SignedStream:
    """A file that `torch.save` writes to, and that is signed at the end.

    The last two bytes of a zip archive without a comment are the length of that comment. They change with the
    signature, so they are held back from the file and the hash until it is known which bytes are the last.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.digest = hashlib.sha256()
        self.held_back = b''
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all but the last two bytes so far; the number of bytes that were taken, as files do it."""
        num_bytes = memoryview(data).nbytes
        if num_bytes == 0:
            return 0
        view = memoryview(data).cast('B')
        if len(view) < 2:
            view = memoryview(self.held_back + bytes(view))
        else:
            self._emit(self.held_back)
        self._emit(view[:-2])
        self.held_back = bytes(view[-2:])
        return num_bytes

    def _emit(self, data: bytes | memoryview) -> None:
        # An exception may not pass through torch's writer, whose destructor would write again and abort.
        if self.error is not None:
            return
        try:
            self.digest.update(data)
            self.file.write(data)
        except OSError as error:
            self.error = error

    def flush(self) -> None:
        """Torch calls it, but the file is complete only after `sign`."""

    def sign(self) -> None:
        """Write the signature as the comment of the archive.

        Raises:
            OSError: this write or an earlier one failed.
        """
        assert self.error or self.held_back == b'\0\0', f'{self.held_back} is no empty comment of a zip'
        if self.error is not None:
            raise self.error
        self.file.write(_comment(self.digest.hexdigest()))
        self.file.flush()


def _comment(digest: str) -> bytes:
    """A signature as it stands at the end of a zip archive: the length of the comment, then the comment."""
    return struct.pack('<H', SIGNATURE_SIZE) + SIGNATURE + digest.encode()


def write_signed(content: Any, path: str | os.PathLike) -> None:
    """`torch.save` with a signature, straight into `path`.

    Use `save_file` where somebody may read the file meanwhile.
    """
    with open(path, 'wb') as file:
        stream = _SignedStream(file)
        torch.save(content, stream)
        stream.sign()


def save_file(content: Any, path: str | os.PathLike) -> None:
    """Write a signed file of torch, whole or not at all.

    Raises:
        OSError: the disk is full or not writable; what was at `path` before is intact.
    """
    with atomic_path(path) as temporary:
        write_signed(content, temporary)
    sync_folder(Path(path).parent)


def save_safetensors(state: dict[str, torch.Tensor], path: str | os.PathLike) -> str:
    """Write flat weights as safetensors, whole or not at all; equal weights give equal bytes.

    Returns:
        The SHA-256 of the file.
    Raises:
        OSError: the disk is full or not writable; what was at `path` before is intact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file as save
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    try:
        with atomic_path(path) as temporary:
            save(tensors, temporary, metadata=dict(format='pt'))
            with temporary.open('rb') as file:
                _, digest = _digests(file, 0)
    except SafetensorError as error:
        raise OSError(f'could not write {os.fspath(path)!r} ({error}): free some space') from error
    sync_folder(Path(path).parent)
    return digest


# ---------------------------------------------------------------------------------------------- reading
def load_file(path: str | os.PathLike, verify: bool | None = None) -> dict[str, Any]:
    """The dict in a file of torch or safetensors, whatever its name ends with, on the CPU.

    Args:
        verify: whether to look for damage first: by the signature in our files, by the check sums of members
            in other files of torch. None does so on the first process of a node alone, since all processes of
            a node read the same file.
    Raises:
        FileNotFoundError: there is no file.
        UnusableFile: the file is damaged, of another kind, or holds other objects than tensors and plain
            values.
        ValueError: the file system refuses to read it.
    """
    if verify is None:
        verify = dist.is_local_master()
    content, _, _ = _load(path, verify=verify, hashed=False)
    return content


def load_with_digest(path: str | os.PathLike,
                     accept: Callable[[str], None] = lambda digest: None) -> tuple[dict[str, Any], str]:
    """The content that `load_file` returns, verified, and the SHA-256 of the very file that was loaded.

    Args:
        accept: is called with the SHA-256 before anything is loaded; an error that it raises ends the call.
    Raises:
        See `load_file`.
    """
    content, digest, _ = _load(path, verify=True, hashed=True, accept=accept)
    return content, digest


def load_on_all_ranks(path: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """`load_with_digest` on every rank, with the same file on all of them; every rank calls it.

    The first process of a node hashes the file, the other ones compare its identity with that of their file.

    Raises (on all ranks, if on one of them):
        FileNotFoundError, ValueError: see `load_file`.
        ValueError: ranks have read different files.
    """
    node = (socket.gethostname(), os.environ.get('GROUP_RANK', ''))
    for _ in range(ATTEMPTS):
        content = {}
        digest = ''
        identity = None
        failure = None
        try:
            is_first = dist.is_local_master()
            content, digest, identity = _load(path, verify=is_first, hashed=is_first)
        except (ValueError, FileNotFoundError) as error:
            failure = error

        # All ranks raise the same error, or none does: a rank that goes on alone would wait for ever.
        seen = dist.allgather_object((node, os.fspath(path), digest, identity, failure))
        for *_, failure_of_rank in seen:
            if failure_of_rank is not None:
                raise failure_of_rank
        difference = _difference(seen)
        if not difference:
            return content, seen[0][2]
        # Somebody may have replaced the file while the ranks read it.
    raise ValueError(difference)


def _difference(seen: list[tuple]) -> str:
    """What to say about the first rank that has read another file than the ranks before it; '' if none has.

    Args:
        seen: (node, path, digest or '', identity, failure) of every rank.
    """
    # Within a node files are compared by identity, and between nodes by digest.
    digest_of_first = seen[0][2]
    identities = {}
    for rank, (node, path, digest, identity, _) in enumerate(seen):
        is_same_on_node = identity == identities.setdefault(node, identity)
        if not is_same_on_node or digest not in ('', digest_of_first):
            return (f'rank {rank} on host {node[0]} has read another file at {path!r} than rank 0 on host '
                    f'{seen[0][0][0]}: make sure that the file is the same on all nodes, and that nobody '
                    'replaces it meanwhile')
    return ''


def _load(path: str | os.PathLike, verify: bool, hashed: bool,
          accept: Callable[[str], None] = lambda digest: None) -> tuple[dict[str, Any], str, Identity]:
    """The content of a file, its SHA-256 if `hashed` (else ''), and its identity, all of the same file."""
    for _ in range(ATTEMPTS):
        before = identity_of(path)
        failure = None
        try:
            digest = _examine(path, verify, hashed, accept)
            content = _read(path)
        except ValueError as error:
            failure = error
        # A training replaces its checkpoints: the file that was hashed must be the file that was loaded.
        if identity_of(path) == before:
            if failure is not None:
                raise failure
            return content, digest, before
    raise ValueError(f'{os.fspath(path)!r} was replaced while it was read, {ATTEMPTS} times in a row: copy '
                     'it, and pass the copy')


def damaged(path: str | os.PathLike, reason: str) -> UnusableFile:
    """The error for a file whose bytes are not those that were written."""
    return UnusableFile(f'{os.fspath(path)!r} cannot be read: it is damaged, cut off or no file of weights '
                        f'({" ".join(reason.split())[:200]}); {DOWNLOAD_AGAIN}')


# ---------------------------------------------------------------------------------------------- verification
def _examine(path: str | os.PathLike, verify: bool, hashed: bool, accept: Callable[[str], None]) -> str:
    """Look for damage if `verify`; return the SHA-256 if `hashed` (else ''), once `accept` has taken it."""
    try:
        with open(path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            signed_size = _signed_size(file, size) if verify else 0
            digest = ''
            if signed_size or hashed:
                signed_digest, digest = _digests(file, signed_size)

            # First, since a caller who knows the digest has more to say than a check sum.
            if hashed:
                accept(digest)
            if signed_size:
                file.seek(signed_size)
                if file.read() != _comment(signed_digest):
                    raise damaged(path, 'its bytes are not those of its signature')
            elif verify:
                _check_members(file, path)
            return digest if hashed else ''
    except OSError as error:
        raise _no_access(path, error) from None


def _signed_size(file: IO[bytes], size: int) -> int:
    """Number of bytes at the beginning of a file that its signature covers; 0 if it has no signature.

    Any comment as long as a signature counts as one, so that damage within the comment is noticed, too.
    """
    begin = size - SIGNATURE_SIZE - END_SIZE
    if begin < 0:
        return 0
    file.seek(begin)
    if file.read(4) != END_OF_ZIP:
        return 0
    return size - SIGNATURE_SIZE - 2


def _digests(file: IO[bytes], num_bytes: int) -> tuple[str, str]:
    """SHA-256 of the first `num_bytes` and of all bytes, in one pass."""
    digest = hashlib.sha256()
    file.seek(0)
    while num_bytes > 0 and (block := file.read(min(BLOCK, num_bytes))):
        digest.update(block)
        num_bytes -= len(block)
    of_beginning = digest.copy()
    while block := file.read(BLOCK):
        digest.update(block)
    return of_beginning.hexdigest(), digest.hexdigest()


def _check_members(file: IO[bytes], path: str | os.PathLike) -> None:
    """Compare every member of a zip archive with its check sum; other kinds of files have no check sums."""
    file.seek(0)
    if _kind(file, path) != 'zip':
        return
    with _opened_zip(file, path) as archive:
        members = archive.infolist()

        # The reader of zip archives accepts a comment that is cut off, so its length is compared here.
        file.seek(-END_SIZE - len(archive.comment), os.SEEK_END)
        end_of_zip = file.read(END_SIZE)
        is_cut = False
        if end_of_zip.startswith(END_OF_ZIP):
            comment_size, = struct.unpack('<20xH', end_of_zip)
            is_cut = comment_size != len(archive.comment)
        if is_cut or archive.comment.startswith(SIGNATURE):
            raise damaged(path, 'bytes were added or lost at its end')

        # Torch can be told to write no check sums, which are all zero then.
        if not any(member.CRC for member in members):
            return
        for member in members:
            try:
                with archive.open(member) as content:
                    while content.read(BLOCK):
                        pass
            except OSError as error:
                if error.filename is not None or error.errno not in (None, 22):
                    raise
                raise damaged(path, str(error)) from None
            except Exception as error:  # foreign bytes make the reader of zip archives raise anything
                raise damaged(path, str(error)) from None


def _opened_zip(file: IO[bytes], path: str | os.PathLike) -> zipfile.ZipFile:
    """An open file as a zip archive; a damaged one is refused as such."""
    try:
        return zipfile.ZipFile(file)
    except OSError as error:
        if error.errno not in (None, 22):  # an offset before the beginning is an invalid argument
            raise
        raise damaged(path, str(error)) from None
    except Exception as error:  # foreign bytes make the reader of zip archives raise anything
        raise damaged(path, str(error)) from None


# ---------------------------------------------------------------------------------------------- content
def _kind(file: IO[bytes], path: str | os.PathLike) -> str:
    """The kind of a file by its content: 'zip', 'safetensors' or 'legacy' (torch before 1.6).

    Raises:
        UnusableFile: the file is something else that is often mistaken for weights.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(1024)
    name = repr(os.fspath(path))
    text = head.lstrip().lower()
    if head.startswith(b'version https://git-lfs'):
        raise UnusableFile(f'{name} cannot be read: it is a pointer of Git LFS of {size} bytes, which stands '
                           'for the weights: run git lfs pull in its folder, or download the file itself')
    if text.startswith((b'<!doctype', b'<html', b'<head', b'<?xml')):
        raise UnusableFile(f'{name} cannot be read: it is a web page, not the weights: the download went '
                           'wrong, so open the link in a browser, and save the file itself')
    if head.startswith(b'\x1f\x8b'):
        raise UnusableFile(f'{name} cannot be read: it is packed by gzip: unpack it, and pass what comes out')
    if len(head) > 9 and head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= size - 8:
        return 'safetensors'
    if head.startswith(b'\x80'):
        return 'legacy'
    if head.startswith(b'PK') or zipfile.is_zipfile(file):
        return 'zip'
    if _is_text(head):
        raise UnusableFile(f'{name} cannot be read: it is text, not weights ({head[:40].decode()!r} ...): '
                           f'{DOWNLOAD_AGAIN}, or pass another file')
    return 'legacy'  # the reader of this kind will say what is wrong


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a file, at most 1,024, are printable text."""
    if len(head) == 1024:
        head = head[:-4]  # the last character may be cut in two
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def _read(path: str | os.PathLike) -> dict[str, Any]:
    """The dict in a file, read in the way of its kind."""
    try:
        with open(path, 'rb') as file:
            kind = _kind(file, path)
            if kind == 'zip':
                file.seek(0)
                with _opened_zip(file, path) as archive:
                    _check_is_torch(archive, path)
        is_named_safetensors = Path(path).suffix == '.safetensors'
        if is_named_safetensors != (kind == 'safetensors') and dist.is_local_master():
            logger.warning('%r is a file of %s in spite of its name, and read as such', os.fspath(path),
                           'safetensors' if kind == 'safetensors' else 'torch')
        if kind == 'safetensors':
            from safetensors.torch import load_file as load_safetensors
            content = load_safetensors(path)
        else:
            # A mapped file is shared in memory by the ranks of a node; files before torch 1.6 cannot be
            # mapped.
            with torch.serialization.safe_globals(NUMPY_DATA):
                content = torch.load(path, map_location='cpu', weights_only=True, mmap=kind == 'zip')
    except (ImportError, UnusableFile):
        raise
    except OSError as error:
        raise _no_access(path, error) from None
    except MemoryError:
        raise ValueError(f'{os.fspath(path)!r} needs more memory than there is: free some, or take a larger '
                         'machine') from None
    except Exception as error:  # foreign bytes make the unpickler raise anything
        raise _explained(path, error) from error
    if not isinstance(content, dict) or not isinstance(content.get('trainer', {}), dict):
        raise UnusableFile(f'expected a checkpoint or a state dict in {os.fspath(path)!r}, got something '
                           'else: check it')
    return content


def _check_is_torch(archive: zipfile.ZipFile, path: str | os.PathLike) -> None:
    """Refuse zip archives that `torch.save` has not written, and say what they are."""
    names = archive.namelist()
    file_names = [member.rpartition('/')[2] for member in names]
    name = repr(os.fspath(path))
    if 'data.pkl' not in file_names:
        what = 'a zip archive without data of torch'
        if names and all(member.endswith('.npy') for member in names):
            what = 'arrays of numpy'
        raise UnusableFile(f'{name} cannot be read: it is {what} ({", ".join(names[:3]) or "empty"}): if the '
                           'weights are inside, unpack it, and pass their file')
    if 'constants.pkl' in file_names:
        raise UnusableFile(f'{name} cannot be read: it is a program of TorchScript, not a dict of weights: '
                           'if you trust it, save torch.jit.load(path).state_dict() by torch.save, and pass '
                           'that file')
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise UnusableFile(f'{name} cannot be read: its members are compressed, as torch never does: '
                           f'{DOWNLOAD_AGAIN}, as it was saved')


def _explained(path: str | os.PathLike, error: Exception) -> ValueError:
    """The error of torch's or safetensors' reader as one line."""
    text = str(error)
    name = repr(os.fspath(path))
    # Where torch cannot open or map a file, its message ends with the number of the error.
    if text.startswith('unable to ') and re.search(r'\(\d+\)$', text.splitlines()[0]):
        return _no_access(path, OSError(text.splitlines()[0]))
    if 'argparse.Namespace' in text:
        return UnusableFile(f'{name} holds a pickled argparse.Namespace beside its weights, and pickled '
                            "objects are not read: if you trust it, save the dict without 'args', once, with "
                            'torch.load(path, weights_only=False)')
    refused = re.search(r"GLOBAL ([\w.<>]+)|but got <class '([^']+)'>", text)
    if refused:
        return UnusableFile(f'{name} cannot be read: it holds a pickled {refused[1] or refused[2]}, and '
                            'pickled objects are not read, since they can run code: if you trust the file, '
                            'save its '
                            'weights alone, once: torch.save(dict(model=weights), NEW_PATH), with the '
                            'weights from torch.load(path, weights_only=False)')
    return damaged(path, text.splitlines()[0] if text else type(error).__name__)


def _named(function: Callable, module: str) -> Callable:
    """A function under the name by which a pickle calls it."""
    def call(*args: Any) -> Any:
        return function(*args)

    call.__module__ = module
    call.__name__ = function.__name__
    call.__qualname__ = function.__name__
    return call


def _numpy_data() -> list[Callable]:
    """The functions that the pickle of a numpy number or numeric array calls; none of them can run code."""
    # The module was renamed in numpy 2, and files name the one that they were written with.
    named = []
    for example in (np.array(0.), np.float64(0.)):
        rebuild = example.__reduce__()[0]
        named.append(_named(rebuild, 'numpy.core.multiarray'))
        named.append(_named(rebuild, 'numpy._core.multiarray'))

    # Classes of data types have different names in different versions, so they are looked up by example.
    types = {type(np.dtype(code)) for code in '?bhilqBHILQefdgFDGSU'}
    return [np.dtype, np.ndarray, *types, *named]


NUMPY_DATA = _numpy_data()
