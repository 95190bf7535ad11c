"""Published checkpoints by name: a local file first, else the model hub through huggingface_hub."""
import difflib
import hashlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.checkpoint import load_file

logger = logging.getLogger(__name__)

PUBLISHED = {  # file name -> hub repository
    **dict.fromkeys(['vae_ch160v4096z32.pth', 'var_d16.pth', 'var_d20.pth', 'var_d24.pth', 'var_d30.pth',
                     'var_d36.pth'], 'FoundationVision/var'),
    # the number is that of the last epoch, from 0 on
    **dict.fromkeys(['FlexVAE.pth', 'FlexVARd16-epo179.pth', 'FlexVARd20-epo249.pth',
                     'FlexVARd24-epo349.pth'], 'jiaosiyu1999/FlexVAR'),
}


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(name: str, sha256: str = '') -> Path:
    """Local path of a checkpoint.

    Args:
        name: a path, or a published name, downloaded into the hub's cache if not in the working directory.
        sha256: expected digest; empty accepts any.
    Raises:
        ValueError: there is no such file and it cannot be downloaded, or its digest differs.
    """
    path = Path(name)
    if not path.is_file():
        repo = PUBLISHED.get(name)
        if repo is None:
            near = difflib.get_close_matches(path.name, PUBLISHED)
            published = f', or the name of a published file, such as {", ".join(near)}' if near else ''
            raise ValueError(f'expected a checkpoint, found no file {name!r}: pass a path{published}')
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging as hub_logging
        hub_logging.set_verbosity_error()  # silences retries
        try:
            path = Path(hf_hub_download(repo, name))
        except Exception as error:  # of many kinds, which all mean that the file is unreachable
            raise ValueError(f'{name!r} is not in the working directory and cannot be fetched from the hub '
                             f'repository {repo} ({type(error).__name__}): '
                             'download it elsewhere and pass its path') from None
    found = sha256_of(path) if sha256 else ''
    if found != sha256:
        raise ValueError(f'{str(path)!r} has SHA-256 {found[:16]}..., expected {sha256[:16]}...: '
                         'download it again')
    return path


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
