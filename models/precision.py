"""Products in full float32, where a small difference of large numbers decides.

`utils.misc` has a context for whole networks; `models` stands without `utils`, and needs products alone.
"""
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.cache
def spend_deprecation_warnings() -> None:
    """Some releases of torch warn once per process at the first use of the older setting of precision."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())


@contextmanager
def float32_matmul() -> Iterator[None]:
    """Full float32 products inside, without TF32, which has 10 bits; afterwards all settings are as before.

    Since torch 2.9 there is a setting for every kind of product, which falls back on that of its library and
    of all libraries, beside the older single one, which cannot be read where they contradict each other. The
    newer ones are cleared from the general to the special, so that each shows what it holds itself, and are
    all restored exactly.
    """
    backends = torch.backends
    newer = []
    if hasattr(backends.cuda.matmul, 'fp32_precision'):
        newer = [backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul]
    before = []
    for setting in newer:
        before.append(setting.fp32_precision)
        setting.fp32_precision = 'none'
    if newer:
        spend_deprecation_warnings()
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for setting, precision in zip(newer, before, strict=True):
            setting.fp32_precision = precision
