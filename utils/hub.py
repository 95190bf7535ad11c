"""Published checkpoints by name: a local file first, else the model hub through huggingface_hub."""
import hashlib
from pathlib import Path

PUBLISHED = {  # file name -> hub repository
    **dict.fromkeys(['vae_ch160v4096z32.pth', 'var_d16.pth', 'var_d20.pth', 'var_d24.pth', 'var_d30.pth',
                     'var_d36.pth'], 'FoundationVision/var'),
}


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') \
            else hashlib.sha256(file.read()).hexdigest()


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
            raise ValueError(f'expected a checkpoint, found no file {name}: '
                             f'pass a path or one of {sorted(PUBLISHED)}')
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging as hub_logging
        hub_logging.set_verbosity_error()  # retries are no news, their outcome is
        try:
            path = Path(hf_hub_download(repo, name))
        except Exception as error:  # the hub's client raises many kinds, all of them mean "not to be had now"
            raise ValueError(f'{name} is not in the working directory and cannot be fetched from the hub '
                             f'repository {repo} ({type(error).__name__}): '
                             'download it elsewhere and pass its path') from None
    if sha256 and sha256_of(path) != sha256:
        raise ValueError(f'{path} has SHA-256 {sha256_of(path)[:16]}..., expected {sha256[:16]}...: '
                         'download it again')
    return path
