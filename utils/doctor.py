"""What this machine can run: `python -m utils.doctor` lists versions, devices, precisions, attention kernels.

An entry point: unlike the rest of utils it knows the models, whose chooser it asks.
"""
import importlib.metadata
import os
import platform
import shutil

import torch

from models.attention import explain_backend
from utils.amp_sc import bfloat16_on_cpu
from utils.machine import SHARED_MEMORY, available_cpus
from utils.provenance import unusable_gpu

PACKAGES = ('torch', 'torchvision', 'numpy', 'pillow', 'scipy', 'tensorboard', 'huggingface_hub',
            'safetensors', 'scikit-learn', 'flash-attn', 'xformers')
NUM_TOKENS = 255  # of VAR's leading scales, which attend under one mask in training


def version(package: str) -> str:
    """Installed version of a package, or 'not installed'."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'


def kernels(device: str, dtype: torch.dtype) -> list[str]:
    """Two lines: the kernel of attention with a mask and without, and why.

    In training the leading scales have a mask; all others have none, nor has sampling.
    """
    masked = explain_backend(device, dtype, has_bias=True, num_keys=NUM_TOKENS)
    unmasked = explain_backend(device, dtype, has_bias=False, num_keys=NUM_TOKENS)
    name = str(dtype).removeprefix('torch.')
    return [f'attention {name:9} with a mask: {masked}', f'{"":19} without: {unmasked}']


def bfloat16() -> str:
    """Whether bfloat16 is fast on the CPU, and why."""
    is_fast, reason = bfloat16_on_cpu()
    return f'fast ({reason})' if is_fast else f'slow ({reason}): leave out --fp16=2'


def processes(num_cpus: int) -> str:
    """How to start a training or a sampling job on the CPU.

    Processes with one thread each are as fast as the threads of one process, and lose far less where other
    jobs take their turn on the same CPUs.
    """
    if num_cpus == 1:
        return 'one process with one thread: python train.py'
    return ('a process per CPU, each with one thread: '
            f'OMP_NUM_THREADS=1 torchrun --nproc_per_node={num_cpus} train.py')


def shared_memory() -> str:
    """Room for the batches of loader processes."""
    try:
        return f'{shutil.disk_usage(SHARED_MEMORY).free / 2 ** 20:,.0f} MiB free in {SHARED_MEMORY}'
    except OSError:
        return f'no {SHARED_MEMORY}'


def report() -> list[str]:
    """The lines this command prints."""
    has_cuda = torch.cuda.is_available()
    device = 'cuda' if has_cuda else 'cpu'
    lines = [f'python          {platform.python_version()} on {platform.platform()}',
             *(f'{name:15} {version(name)}' for name in PACKAGES),
             f'{"cpu":15} {os.cpu_count()} cores, {available_cpus()} for this process, '
             f'{torch.get_num_threads()} threads',
             f'{"bf16 on cpu":15} {bfloat16()}',
             f'{"shared memory":15} {shared_memory()}']
    if has_cuda:
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(f'{f"cuda:{i}":15} {properties.name}, {properties.total_memory / 2 ** 30:.0f} GiB')
        lines.append(f'{"cuda, cudnn":15} {torch.version.cuda}, {torch.backends.cudnn.version()}')
        lines.append(f'{"bf16 on cuda":15} {torch.cuda.is_bf16_supported()}')
    else:
        lines.append(f'{"cuda":15} {unusable_gpu() or "not available"}')
        lines.append(f'{"advice for cpu":15} {processes(available_cpus())}')
    has_nccl = has_cuda and torch.distributed.is_nccl_available()
    lines.append(f'{"collectives":15} {"nccl" if has_nccl else "gloo"}')
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        lines += kernels(device, dtype)
    return lines


if __name__ == '__main__':
    print('\n'.join(report()))  # noqa: T201
