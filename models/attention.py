"""Attention behind one call: `attend`, the chooser of its kernel, and the key/value cache of sampling.

Letters: B batch, L sequence, H heads, d head dim. q, k, v and every result are (B, L, H, d) in any kernel.
"""
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.scales import BlockCausal

HALF = (torch.float16, torch.bfloat16)
Mask = torch.Tensor | BlockCausal | None  # what `attend` takes as its bias


@functools.cache
def optional_module(name: str):
    """The imported module, or None when it is not installed or does not load on this machine."""
    try:
        return importlib.import_module(name)
    except Exception:  # a package built for another torch or another GPU raises anything while it loads
        return None


def has_functions(name: str, *functions: str) -> bool:
    """Whether an optional module is there with what is needed of it.

    An empty folder of that name is a module as well, and builds for some machines lack functions.
    """
    module = optional_module(name)
    return all(callable(getattr(module, function, None)) for function in functions)


def choose_backend(requested: str, device: torch.device | str, dtype: torch.dtype, has_bias: bool,
                   num_keys: int = 0) -> str:
    """Name of the kernel `attend` runs: the first row whose every column holds.

    | kernel   | installed  | device | dtype                  | bias                             |
    |----------|------------|--------|------------------------|----------------------------------|
    | flash    | flash_attn | CUDA   | float16, bfloat16      | none                             |
    | xformers | xformers   | CUDA   | float16, bfloat16, f32 | none, or num_keys a multiple of 8|
    | sdpa     | torch      | any    | any                    | any                              |

    Args:
        requested: 'auto' walks the table; a kernel's name asks for that one and raises if it cannot run.
    Raises:
        ValueError: an unknown name, or a kernel that does not suit these inputs.
    """
    table = _table(device, dtype, has_bias, num_keys)
    if requested == 'auto':
        return next(kernel for kernel, columns in table.items() if all(holds() for holds in columns.values()))
    if requested not in table:
        raise ValueError(f'attention backend must be auto or one of {list(table)}, got {requested!r}')
    if not all(holds() for holds in table[requested].values()):
        raise ValueError(f'attention backend {requested!r} cannot run here '
                         f'({device}, {dtype}, bias={has_bias}): '
                         "pass 'auto', or install the package and use CUDA in half precision")
    return requested


def explain_backend(device: torch.device | str, dtype: torch.dtype, has_bias: bool, num_keys: int = 0) -> str:
    """What `choose_backend` takes by itself, and which columns of its table rule out the rows above."""
    chosen = choose_backend('auto', device, dtype, has_bias, num_keys)
    reasons = []
    for kernel, columns in _table(device, dtype, has_bias, num_keys).items():
        if kernel == chosen:
            break
        failing = [name for name, holds in columns.items() if not holds()]
        reasons.append(f'no {kernel}: {", ".join(failing)}')
    return f'{chosen} ({"; ".join(reasons)})' if reasons else chosen


def _table(device: torch.device | str, dtype: torch.dtype, has_bias: bool,
           num_keys: int) -> dict[str, dict[str, Callable[[], bool]]]:
    """Whether each column of the table in `choose_backend` holds, by kernel, in the order of its rows.

    They are functions, and what is installed comes last, so that nothing is imported for another device.
    """
    on_cuda = torch.device(device).type == 'cuda'
    return dict(
        flash={
            'device': lambda: on_cuda,
            'dtype': lambda: dtype in HALF,
            'bias': lambda: not has_bias,
            'not installed': lambda: has_functions('flash_attn', 'flash_attn_func'),
        },
        xformers={
            'device': lambda: on_cuda,
            'dtype': lambda: dtype in (*HALF, torch.float32),
            'bias': lambda: not has_bias or num_keys % 8 == 0,
            'not installed': lambda: has_functions('xformers.ops', 'memory_efficient_attention',
                                                   'LowerTriangularMask'),
        },
        sdpa={},
    )


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, bias: Mask = None,
           scale: float | None = None, causal: bool = False, dropout_p: float = 0.,
           backend: str = 'auto') -> torch.Tensor:
    """softmax(scale * q k^T + bias) v.

    Args:
        q: (B, Lq, H, d). k, v: (B, Lk, H, d), of the dtype of q; or of fewer heads, each of which serves as
            many queries.
        bias: additive, broadcastable to (B, H, Lq, Lk); or which scales see which, where Lq == Lk.
        scale: None means d ** -0.5.
        causal: query i sees keys 0..i; needs Lq == Lk and no bias.
        dropout_p: probability of dropping an attention weight.
        backend: see `choose_backend`.
    Returns:
        (B, Lq, H, d).
    """
    if isinstance(bias, BlockCausal):
        return _attend_by_scale(q, k, v, bias, scale=scale, dropout_p=dropout_p, backend=backend)
    kernel = choose_backend(backend, q.device, q.dtype, bias is not None, k.shape[1])
    if kernel == 'flash':
        # A training with a seed asks for the backward pass whose sums have a fixed order, which is slower.
        deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        return optional_module('flash_attn').flash_attn_func(q, k, v, dropout_p, scale, causal,
                                                             deterministic=deterministic)
    if kernel == 'xformers':
        ops = optional_module('xformers.ops')
        if k.shape[2] < q.shape[2]:
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        if causal:
            bias = ops.LowerTriangularMask()
        elif bias is not None:
            bias = bias.to(q.dtype).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p, scale=scale)
    # SDPA wants heads before positions: BLHd -> BHLd, and back.
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if bias is not None:
        bias = bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, is_causal=causal,
                                         dropout_p=dropout_p, enable_gqa=k.shape[1] < q.shape[1])
    return out.transpose(1, 2)


def _attend_by_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockCausal,
                     **options: Any) -> torch.Tensor:
    """`attend` of each scale to all keys up to its own end, the leading scales together."""
    outs = []
    begin = 0
    for end in mask.ends:
        bias = mask.bias_11ll if begin == 0 else None
        outs.append(attend(q[:, begin:end], k[:, :end], v[:, :end], bias=bias, **options))
        begin = end
    return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]


def compile_around_attention(blocks: Iterable[nn.Module], **options: Any) -> None:
    """Compile `before_attention` and `after_attention` of each block; keys of weights stay as they are.

    The attention itself is a kernel already, and what is around it changes: a cache grows, or there is a call
    for every scale of a pyramid. So the graphs of the two parts serve all blocks and any pyramid.

    Args:
        options: see `torch.compile`.
    """
    for block in blocks:
        block.before_attention = torch.compile(block.before_attention, fullgraph=True, **options)
        block.after_attention = torch.compile(block.after_attention, fullgraph=True, **options)


class KVCache:
    """Keys and values of the tokens sampled so far, in storage allocated once and written by slice.

    Args:
        capacity: tokens that are stored; what comes then is seen once, with those, and forgotten. None stores
            all, in storage that grows by doubling.
    """

    def __init__(self, capacity: int | None = None):
        self.grows = capacity is None
        self.capacity = capacity or 0
        self.length = 0
        self.storage: torch.Tensor | None = None  # (2, B, capacity, H, d)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (B, l, H, d) keys and values; returns all that their queries see, (B, length, H, d) each."""
        end = self.length + k.shape[1]
        if end > self.capacity and not self.grows:
            if self.storage is None:
                return k, v
            stored = self.storage[:, :, :self.length]
            return torch.cat([stored[0], k], dim=1), torch.cat([stored[1], v], dim=1)

        # The first keys tell batch, heads and width. Where the capacity was not known, it doubles, so that
        # each key is copied twice at most on average.
        if self.storage is None or end > self.capacity:
            if end > self.capacity:
                self.capacity = max(end, 2 * self.capacity)
            storage = k.new_empty(2, k.shape[0], self.capacity, *k.shape[2:])
            if self.storage is not None:
                storage[:, :, :self.length] = self.storage[:, :, :self.length]
            self.storage = storage
        self.storage[0, :, self.length:end] = k
        self.storage[1, :, self.length:end] = v
        self.length = end
        return self.storage[0, :, :end], self.storage[1, :, :end]

    def truncate(self, batch: int) -> None:
        """Forget all images but the first `batch`."""
        self.storage = self.storage[:, :batch]


@contextmanager
def kv_caching(blocks: Iterable[nn.Module], capacity: int) -> Iterator[None]:
    """Give every `block.attn` a fresh cache for the duration of the context, and always take it away."""
    attns = [block.attn for block in blocks]
    for attn in attns:
        attn.cache = KVCache(capacity)
    try:
        yield
    finally:
        for attn in attns:
            attn.cache = None
