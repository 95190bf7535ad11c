"""Settings of app.py, and its command line.

Torch and gradio are not imported here, so that wrong flags and missing files are answered at once.
"""
import importlib.util
import socket
from dataclasses import dataclass
from pathlib import Path

from configs.options import REPO, check_values, check_weights, expand_paths, opt, parse_settings
from utils.console import require_weights

OUTPUT = REPO / 'local_output'  # where trainings leave their checkpoints
LOCAL_ADDRESS = '127.0.0.1'
EVERY_ADDRESS = '0.0.0.0'


@dataclass(frozen=True)
class AppSettings:
    """Which weights the page draws with, and who can reach it."""

    ckpt: str = opt('', 'weights: a checkpoint, a folder, a published name, or owner/name of the hub; empty '
                        'takes the newest checkpoint of a generator below local_output', path=True)
    vae_ckpt: str = opt('', 'tokenizer weights; empty takes those inside the file, or the published ones',
                        path=True)
    model: str = opt('', 'family, where the file does not tell it')
    weights: str = opt('ema', 'ema: averaged weights where the file has them; raw: those of the last step; '
                              'ema_0.9999: one of several averages')
    precision: int = opt(0, '0 float32, 1 float16, 2 bfloat16', 'fp16', limits=(0, 2))
    device: str = opt('', 'cpu or cuda; empty takes cuda where there is one', choices=('', 'cpu', 'cuda'))
    port: int = opt(7860, 'of the page', limits=(1, 65535))
    listen: bool = opt(False, 'let other machines reach the page; needs --auth')
    auth: str = opt('', 'file with a line NAME:PASSWORD for everybody who may use the page', path=True)

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        check_weights(self.weights, 'weights')
        if self.listen and not self.auth:
            raise ValueError('--listen lets everybody in the network use this machine: pass --auth=FILE, a '
                             'file with a line NAME:PASSWORD for everybody who may')

    @property
    def address(self) -> str:
        """The address at which the page is served."""
        return EVERY_ADDRESS if self.listen else LOCAL_ADDRESS

    def require_files(self) -> None:
        """Make sure that what the page needs is there: gradio, weights, names with passwords, the port.

        Raises:
            ValueError: something is not.
        """
        if importlib.util.find_spec('gradio') is None:
            raise ValueError('the web page needs gradio: pip install -r requirements-web.txt, best in an '
                             'environment of its own, since gradio asks for an older Pillow')
        require_weights(self.source)
        require_weights(self.vae_ckpt)
        self.logins()
        require_port(self.address, self.port)

    @property
    def source(self) -> str:
        """The weights that are loaded.

        Raises:
            ValueError: none are named, and there is no checkpoint.
        """
        return self.ckpt or str(newest_generator(OUTPUT))

    def logins(self) -> list[tuple[str, str]] | None:
        """Names with passwords; None where everybody who reaches the page may use it.

        Raises:
            ValueError: the file cannot be read, or a line is no name with a password.
        """
        if not self.auth:
            return None
        try:
            lines = Path(self.auth).read_text(encoding='utf-8').splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, 'strerror', None) or 'it is no text'
            raise ValueError(f'expected lines NAME:PASSWORD in --auth={self.auth}, cannot read it '
                             f'({reason}): pass such a file') from None
        pairs = [line.partition(':') for line in lines if line.strip()]
        if not pairs or not all(name and password for name, _, password in pairs):
            # The lines themselves are secret.
            raise ValueError(f'expected a line NAME:PASSWORD for everybody in --auth={self.auth}, got '
                             f'{len(pairs)} lines of which one or more are different: correct the file')
        return [(name, password) for name, _, password in pairs]


def newest_generator(folder: Path) -> Path:
    """The checkpoint of a generator that was written last, in a folder and all below it.

    Raises:
        ValueError: there is none.
    """
    found = [path for path in folder.glob('**/ar-ckpt-*.pth') if path.is_file()]
    if not found:
        raise ValueError(f'found no checkpoint of a generator below {folder}: run make demo, which trains '
                         'one in minutes, or pass weights, such as --ckpt=var_d16')
    # Where the last one is the best one, too, both names are of one age.
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def require_port(address: str, port: int) -> None:
    """Make sure that a page can be served there.

    Raises:
        ValueError: the port is in use, or not allowed.
    """
    with socket.socket() as probe:
        # As servers do: a page that has just ended does not block its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ValueError(f'port {port} cannot be used ({error.strerror}): pass another --port') from None


def parse_app(argv: list[str]) -> AppSettings:
    """The settings of a command line."""
    return parse_settings(AppSettings, argv, 'app.py', 'A web page that samples, edits and reconstructs.')
