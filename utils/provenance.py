"""What a result was made with: versions of the packages, commit of this code, device; a GPU left unused."""
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision


def versions() -> dict[str, str | None]:
    """Version of everything that may change a pixel or a score; None of packages that are not installed."""
    def installed(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    return dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__,
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


# ---------------------------------------------------------------------------------------------- GPUs
REPO = Path(__file__).resolve().parent.parent
DEVICES = Path('/dev')
DRIVER = Path('/proc/driver/nvidia')


def unusable_gpu() -> str:
    """One line where this machine seems to have an NVIDIA GPU that torch cannot use, else ''.

    Without it a run would go on a hundred times slower on the CPU, and nobody would know why. A GPU that
    CUDA_VISIBLE_DEVICES hides was hidden on purpose.
    """
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    is_hidden = visible is not None and visible.split(',')[0].strip() in ('', '-1', 'NoDevFiles')
    if is_hidden or torch.cuda.is_available():
        return ''
    devices = sorted(str(path) for path in DEVICES.glob('nvidia[0-9]*'))
    signs = [*devices[:1], *(str(path) for path in [DRIVER] if path.exists()), *_which('nvidia-smi')]
    if not signs:
        return ''
    if torch.version.cuda is None:
        cause = f'torch {torch.__version__} is a build without CUDA: install one with CUDA'
    else:
        cause = (f'torch {torch.__version__} is built for CUDA {torch.version.cuda}, {_driver_version()}: it '
                 'may be too old, or the container or job was not given the GPU')
    return f'this machine seems to have an NVIDIA GPU ({signs[0]}), but torch cannot use it; {cause}'


def _which(program: str) -> list[str]:
    path = shutil.which(program)
    return [path] if path else []


def _driver_version() -> str:
    """What the kernel module says of itself."""
    try:
        found = re.search(r'\b\d{3,4}\.\d+(\.\d+)?\b', (DRIVER / 'version').read_text())
    except (OSError, UnicodeDecodeError):
        found = None
    return f'its driver has version {found[0]}' if found else 'the version of its driver is unknown'
