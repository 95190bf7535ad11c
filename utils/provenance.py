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

    found = dict(
        python=platform.python_version(),
        torch=str(torch.__version__),
        numpy=np.__version__,
        torchvision=torchvision.__version__,
        pillow=PIL.__version__,
    )
    for package in ('scipy', 'scikit-learn', 'torch-fidelity', 'timm'):
        found[package] = installed(package)
    return found


def git_commit() -> str | None:
    """Commit of this checkout, with '+changes' where files differ from it; None outside of git."""
    def git(*args: str) -> str:
        command = ['git', '-C', str(REPO), *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # A copy of this project may lie within another repository, whose commit says nothing about it.
        if git('rev-parse', '--show-toplevel') != str(REPO):
            return None
        commit = git('rev-parse', 'HEAD')
        has_changes = bool(git('status', '--porcelain', '-uno'))
        return f'{commit}+changes' if has_changes else commit
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
    """A line that says so if this machine seems to have an NVIDIA GPU that torch cannot use, else ''.

    Without this line a run would go on a hundred times slower on the CPU, and nobody would know why. A GPU
    that CUDA_VISIBLE_DEVICES hides was hidden on purpose.
    """
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    is_hidden = visible is not None and visible.split(',')[0].strip() in ('', '-1', 'NoDevFiles')
    if is_hidden or torch.cuda.is_available():
        return ''

    # Any of these shows that there is a GPU; the first one is named.
    signs = sorted(str(path) for path in DEVICES.glob('nvidia[0-9]*'))
    if DRIVER.exists():
        signs.append(str(DRIVER))
    program = shutil.which('nvidia-smi')
    if program:
        signs.append(program)
    if not signs:
        return ''
    if torch.version.cuda is None:
        cause = f'torch {torch.__version__} is a build without CUDA: install one with CUDA'
    else:
        cause = (f'torch {torch.__version__} is built for CUDA {torch.version.cuda}, {_driver_version()}: it '
                 'may be too old, or the container or job was not given the GPU')
    return f'this machine seems to have an NVIDIA GPU ({signs[0]}), but torch cannot use it; {cause}'


def _driver_version() -> str:
    """The version of the driver, as its kernel module reports it."""
    try:
        text = (DRIVER / 'version').read_text()
        found = re.search(r'\b\d{3,4}\.\d+(\.\d+)?\b', text)
    except (OSError, UnicodeDecodeError):
        found = None
    return f'its driver has version {found[0]}' if found else 'the version of its driver is unknown'
