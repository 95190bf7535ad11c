"""What a result was made with: versions of the packages, commit of this code."""
import platform
import subprocess
from importlib import metadata

import numpy as np
import PIL
import torch
import torchvision

from utils.recipe import REPO


def versions() -> dict[str, str | None]:
    """Version of everything that may change a pixel or a score; None of packages that are not installed."""
    def installed(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                torchvision=torchvision.__version__, pillow=PIL.__version__) | {
        package: installed(package) for package in ('scipy', 'scikit-learn', 'torch-fidelity')}


def git_commit() -> str | None:
    """Commit of this checkout, with '+changes' where files differ from it; None outside of git."""
    def git(*args: str) -> str:
        return subprocess.run(['git', '-C', str(REPO), *args], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        if git('rev-parse', '--show-toplevel') != str(REPO):
            return None  # the repository around a copy of this project
        return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain', '-uno') else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """Name of a GPU, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device)
