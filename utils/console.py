"""What a program says on the console before it has a log: at its start, and when it fails.

The import of torch and of the modules that need it takes seconds. An entry script therefore reads its command
line first, by this module and `configs`, which need the standard library alone: wrong flags and missing files
are answered at once, and a right command says what it is waiting for.
"""
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.stop import Stopped

logger = logging.getLogger(__name__)
OTHER_RANKS_WAIT = 10  # seconds that all ranks but the first wait before they report an error, too
EMBEDDED_SETS = ('digits', 'toy')  # data sets that need no folder
WEIGHT_FILES = ('.pth', '.pt', '.ckpt', '.safetensors', '.bin')


# ---------------------------------------------------------------------------------------------- the start
def announce(program: str, text: str) -> None:
    """Say on the first rank what a program begins with; results go elsewhere, to the standard output."""
    if int(os.environ.get('RANK', 0)) == 0:
        sys.stderr.write(f'{program}: {text}\n')
        sys.stderr.flush()


def require_data(path: str, flag: str = '--data_path=') -> None:
    """Make sure that a data set is there; what it must hold is looked at later.

    Args:
        flag: stands before the path on the command line.
    Raises:
        ValueError: it is not.
    """
    if path not in EMBEDDED_SETS and not Path(path).exists():
        what = 'file' if path.endswith('.npz') else 'folder'
        raise ValueError(f'expected a data set in {path!r}, found no such {what}: pass {flag}FOLDER, '
                         f'{flag}digits or toy')


def require_weights(path: str) -> None:
    """Make sure that a file of weights is there, if it was given by its path and not by a published name.

    Raises:
        ValueError: it is not.
    """
    is_in_a_repository = ':' in path  # 'owner/name:FILE' of the hub
    is_path = Path(path).suffix in WEIGHT_FILES and path != Path(path).name and not is_in_a_repository
    if is_path and not Path(path).is_file():
        raise ValueError(f'expected a checkpoint, found no file {path!r}: pass a path')


# ---------------------------------------------------------------------------------------------- failures
@contextmanager
def one_line_errors(program: str, exit_code: int = 1) -> Iterator[None]:
    """Report an error that a user can mend in one line, and exit; the traceback goes to stdout.txt.

    Under torchrun the first rank reports first, and the launcher then ends the other ranks before they report
    the same error.

    Args:
        program: begins the line.
        exit_code: for errors that have no exit code of their own.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f'{program}: interrupted; run the same command again to go on')
    except Stopped as stop:
        if int(os.environ.get('RANK', 0)) == 0:
            sys.stderr.write(f'{program}: {stop}\n')
        raise SystemExit(stop.exit_code) from None
    except (ValueError, OSError) as error:
        logger.debug('', exc_info=True)
        message = one_line(error)
        if int(os.environ.get('RANK', 0)) > 0:
            time.sleep(OTHER_RANKS_WAIT)
        stop = SystemExit(f'{program}: {message}')
        code = getattr(error, 'exit_code', exit_code)
        # Python prints the message of a SystemExit itself, but then exits with code 1.
        if code != 1:
            sys.stderr.write(f'{stop}\n')
            stop.code = code
        raise stop from None


def one_line(error: Exception) -> str:
    """The message of an error as one line that names the file, if there is one."""
    # An error of a loader process has its traceback in front, and the names of its kinds.
    text = str(error).strip()
    if ' in DataLoader worker process ' in text:
        text = text[text.rfind('\n') + 1:]
    text = re.sub(r'^([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception): ', '', ' '.join(text.split()))
    if isinstance(error, OSError) and error.strerror and error.filename:
        # In place of "[Errno 28] No space left on device: 'file'".
        return (f'cannot use {os.fsdecode(error.filename)!r} ({error.strerror}): check the path, its '
                'permissions and the free space')
    return text or type(error).__name__
