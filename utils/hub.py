"""Weights by name: a local file or folder first, else the model hub through huggingface_hub."""
import difflib
import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.checkpoint import load_file
from utils.console import WEIGHT_FILES
from utils.model_folder import FILES

logger = logging.getLogger(__name__)


class Published(NamedTuple):
    """A file of weights that the authors of a system have published."""
    family: str               # key of `models.FAMILIES`
    repo: str = ''            # hub repository; '' where nobody here has seen one, so that it is not fetched
    tokenizer: str = ''       # of a generator: the file of the tokenizer that it was trained with
    preset: str = ''          # of a generator: its sampling preset, which also is its short name
    licence: str = ''         # that the repository states; '' where nobody here has seen one
    revision: str = ''        # commit of the repository; '' takes the newest one
    sha256: str = ''          # '' where the authors name no digest


def _var(preset: str) -> Published:
    return Published('var', VAR_REPO, 'vae_ch160v4096z32.pth', preset, licence='MIT')


def _flexvar(preset: str) -> Published:
    return Published('flexvar', FLEXVAR_REPO, 'FlexVAE.pth', preset)


def _flowar(preset: str) -> Published:
    return Published('flowar', FLOWAR_REPO, 'kl16.ckpt', preset, licence='Apache-2.0')


def _npp(preset: str) -> Published:
    return Published('npp', NPP_REPO, 'vq_ds16_c2i.pt', preset)


VAR_REPO = 'FoundationVision/var'
FLEXVAR_REPO = 'jiaosiyu1999/FlexVAR'
FLOWAR_REPO = 'OliverRen/FlowAR'
LLAMAGEN_REPO = 'FoundationVision/LlamaGen'
NPP_REPO = 'pytttttt/LlamaGen-NPP'  # named by the README of NPP
PUBLISHED = {  # by the name of the file
    'vae_ch160v4096z32.pth': Published('vqvae', VAR_REPO, licence='MIT'),
    'var_d16.pth': _var('var_d16'),
    'var_d20.pth': _var('var_d20'),
    'var_d24.pth': _var('var_d24'),
    'var_d30.pth': _var('var_d30'),
    'var_d36.pth': _var('var_d36_512'),
    'FlexVAE.pth': Published('flexvae', FLEXVAR_REPO),
    # the number is that of the last epoch, from 0 on
    'FlexVARd16-epo179.pth': _flexvar('flexvar_d16'),
    'FlexVARd20-epo249.pth': _flexvar('flexvar_d20'),
    'FlexVARd24-epo349.pth': _flexvar('flexvar_d24'),
    'kl16.ckpt': Published('kl16'),  # of MAR, whose README links it elsewhere
    'FlowAR-S.pth': _flowar('flowar_s'),
    'FlowAR-L.pth': _flowar('flowar_l'),
    'FlowAR-H.pth': _flowar('flowar_h'),
    'vq_ds16_c2i.pt': Published('vq16', LLAMAGEN_REPO, licence='MIT'),
    # LlamaGen has files of these names, too, which are other weights
    'c2i_B_256.pt': _npp('npp_b'),
    'c2i_L_256.pt': _npp('npp_l'),
    'c2i_XL_256.pt': _npp('npp_xl'),
    'c2i_XXL_256.pt': _npp('npp_xxl'),
}
SHORT_NAMES = {file.preset: name for name, file in PUBLISHED.items() if file.preset}
HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- files and folders
def locate(source: str | Path, revision: str = '', is_first: bool = True) -> Path:
    """Local path of the file or folder that a name stands for.

    Args:
        source: a path; the name of a published file, or its short name, such as 'var_d16'; a repository of
            the hub, 'owner/name', for a folder of this project; or 'owner/name:FILE' for one file of it.
        revision: branch, tag or commit of a repository; empty is the newest commit, or the one that the table
            of published files names.
        is_first: whether this process asks the hub; the other processes of a node find what it has fetched.
    Raises:
        ValueError: there is nothing of that name, or the hub cannot be reached.
    """
    name = str(source)
    repo, _, file = name.partition(':')
    if Path(name).exists():
        return Path(name)
    is_path = name.endswith(WEIGHT_FILES) and not file
    if not HUB_ID.fullmatch(repo) or is_path:
        return fetch(name, revision=revision, is_first=is_first)
    if file:
        return _hub_file(repo, file, revision, is_first)
    return _hub_folder(repo, revision, is_first)


def fetch(name: str, sha256: str = '', revision: str = '', is_first: bool = True) -> Path:
    """Local path of a checkpoint.

    Args:
        name: a path, or a published or short name, downloaded into the hub's cache if not in the working
            directory.
        sha256: expected digest; empty is that of the table of published files, or else accepts any.
        revision, is_first: see `locate`.
    Raises:
        ValueError: there is no such file and it cannot be downloaded, or its digest differs.
    """
    if not Path(name).is_file():
        name = SHORT_NAMES.get(name, name)
    path = Path(name)
    published = PUBLISHED.get(name)
    if not path.is_file():
        if published is None:
            near = difflib.get_close_matches(path.name, [*PUBLISHED, *SHORT_NAMES])
            names = f', or the name of a published file, such as {", ".join(near)}' if near else ''
            raise ValueError(f'expected a checkpoint, found no file {name!r}: pass a path{names}')
        if not published.repo:
            raise ValueError(f'{name!r} is not in the working directory, and no hub repository of it is '
                             'known here: download it by the links of its authors, and pass its path')
        path = _hub_file(published.repo, name, revision or published.revision, is_first)
    expected = sha256 or (published.sha256 if published else '')
    found = sha256_of(path) if expected else ''
    if found != expected:
        raise ValueError(f'{str(path)!r} has SHA-256 {found[:16]}..., expected {expected[:16]}...: '
                         'download it again')
    return path


def _hub_file(repo: str, file: str, revision: str, is_first: bool) -> Path:
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(repo, file, revision=revision or None, local_files_only=not is_first)

    return _from_hub(download, f'{file!r} is not in the working directory and cannot be fetched from the hub '
                               f'repository {repo}')


def _hub_folder(repo: str, revision: str, is_first: bool) -> Path:
    from huggingface_hub import snapshot_download

    def download() -> str:
        # The weights of other programs, which may lie beside ours, are not needed.
        return snapshot_download(repo, revision=revision or None, allow_patterns=[*FILES],
                                 local_files_only=not is_first)

    return _from_hub(download, f'{repo!r} is no local path, and cannot be fetched as a repository of the hub')


def _from_hub(download: Callable[[], str], failure: str) -> Path:
    """The path that a download returns; its errors become one line."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging
    hub_logging.set_verbosity_error()  # silences retries
    try:
        return Path(download())
    except Exception as error:  # of many kinds, which all mean that the file is unreachable
        offline = ', since HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else ''
        raise ValueError(f'{failure} ({type(error).__name__}{offline}): download it elsewhere and pass '
                         'its path') from None


def upload(repo: str, write: Callable[[Path], None], private: bool = False, keep: Collection[str] = (),
           message: str = 'Upload weights') -> str:
    """Upload a folder as one commit of a repository of the hub, which is made if it does not exist.

    Args:
        repo: 'owner/name'.
        write: writes the files of the folder into an empty one.
        private: of a repository that is made.
        keep: files that stay as they are in the repository if it has them.
        message: of the commit.
    Returns:
        The address of the commit.
    Raises:
        ValueError: `repo` is no such name, or the hub refuses or cannot be reached.
    """
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"expected a repository of the hub, such as 'owner/name', got {repo!r}: pass one")
    from huggingface_hub import HfApi
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            kept = [name for name in keep if api.file_exists(repo, name)]
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message,
                                       ignore_patterns=kept)
        except Exception as error:  # of many kinds: no token, no right, no network
            reason = ' '.join(str(error).split())[:200]
            raise ValueError(f'cannot upload to the hub repository {repo} ({type(error).__name__}: '
                             f'{reason}): log in by the command hf auth login, and check the name and the '
                             'network') from None
    return str(getattr(commit, 'commit_url', commit))


# ------------------------------------------------------------------------------------- networks of losses
class GivenFile(NamedTuple):
    """A file of weights that a loss needs and this project does not ship."""
    name: str
    url: str
    size: str            # for messages
    algorithm: str = ''  # of the digest; '' if no digest is published
    digest: str = ''     # the beginning of the digest, hexadecimal

    def __str__(self) -> str:
        digest = f', {self.algorithm} {self.digest}' if self.digest else ''
        return f'{self.name} ({self.size}{digest})'


TORCH_URL = 'https://download.pytorch.org/models'
HEADS_URL = 'https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1'
LPIPS_FILES = {  # trunk and linear heads, version 0.1
    'vgg': (GivenFile('vgg16-397923af.pth', f'{TORCH_URL}/vgg16-397923af.pth', '528 MB',
                      'sha256', '397923af8e79cdbb'),
            GivenFile('vgg.pth', f'{HEADS_URL}/vgg.pth', '7,289 bytes',
                      'md5', 'd507d7349b931f0638a25a48a722f98a')),
    'alex': (GivenFile('alexnet-owt-7be5be79.pth', f'{TORCH_URL}/alexnet-owt-7be5be79.pth', '233 MB',
                       'sha256', '7be5be79'),
             GivenFile('alex.pth', f'{HEADS_URL}/alex.pth', '6 KB')),
}
DINO_FILE = GivenFile('dino_deitsmall16_pretrain.pth', 'https://dl.fbaipublicfiles.com/dino/'
                      'dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth', '83 MB')


def read_given(path: str | Path, file: GivenFile) -> dict[str, Any]:
    """The content of a file of weights; if it has the published name, it must be the published file.

    Raises:
        ValueError: the digest differs, or the file cannot be read.
    """
    if Path(path).name != file.name:
        logger.warning('%s is taken as it is: only files named %s are compared with the published digest',
                       path, file.name)
    elif file.digest:
        digest = hashlib.new(file.algorithm)
        with Path(path).open('rb') as content:
            while block := content.read(1 << 20):
                digest.update(block)
        if not digest.hexdigest().startswith(file.digest):
            raise ValueError(f'{str(path)!r} has {file.algorithm} {digest.hexdigest()}, expected '
                             f'{file.digest}: download {file.url} again, or rename the file '
                             'if it is another on purpose')
    return load_file(path)


def download(file: GivenFile) -> Path:
    """Path of a file in torch hub's cache, where it is downloaded to if it is missing.

    Raises:
        ValueError: the file cannot be downloaded.
    """
    path = Path(torch.hub.get_dir()) / 'checkpoints' / file.name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(file.url, str(path), progress=False)
        except OSError as error:  # the errors of urllib are of this kind
            raise ValueError(f'{file.url} cannot be downloaded ({error}): fetch it elsewhere and pass '
                             'its path, or train with --lpips=none') from None
    return path


def lpips_state(vgg: str = '', lin: str = '', combined: str = '', allow_download: bool = False,
                trunk: str = 'vgg') -> tuple[dict[str, torch.Tensor], str]:
    """Weights of LPIPS as published, and where they come from.

    Args:
        vgg: file of the trunk.
        lin: file of the linear heads.
        combined: one file with both, in place of the first two.
        allow_download: whether a missing file is downloaded, if it was not given by its path.
        trunk: 'vgg' or 'alex'.
    Returns:
        The flat weights, and the files that they come from, for messages.
    Raises:
        ValueError: a file is missing, cannot be read, or is not what its name says.
    """
    files = LPIPS_FILES[trunk]
    if combined:
        if Path(combined).is_file():
            return load_file(combined), combined
        missing = [combined]
    else:
        paths = [Path(path or file.name) for path, file in zip((vgg, lin), files, strict=True)]
        for i, (path, file) in enumerate(zip(paths, files, strict=True)):
            if allow_download and not path.is_file() and str(path) == file.name:
                paths[i] = download(file)
        missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f'LPIPS finds no file {" and no file ".join(missing)}: pass --lpips_vgg={files[0]} '
                         f'and --lpips_lin={files[1]}, or one file with both as --lpips_path; or fetch them '
                         'with --allow_download=1, or train with --lpips=none')
    states = [read_given(path, file) for path, file in zip(paths, files, strict=True)]
    return states[0] | states[1], ' and '.join(map(str, paths))


def dino_state(path: str) -> tuple[dict[str, Any], str]:
    """Weights of DINO ViT-S/16 in the original layout or timm's, and where they come from.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f'the DINO discriminator finds no file {path or "(no path given)"}: pass '
                         f'--dino_path={DINO_FILE} from {DINO_FILE.url}, or take --disc=patchgan')
    return load_file(path), path
