"""Counts what code launches, moves and multiplies, on real tensors or on fake ones of any size.

It needs no GPU. A count is exact and repeats: kernels launched, bytes that they read and write, FLOPs of
products, reads of a value by the host, and bytes of tensors that are alive at once. A time that is made of it
by `seconds_on` is a model, not a measurement.
"""
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from models import scales

LAUNCH_SECONDS = 5e-6  # of the host for each kernel in eager code
aten = torch.ops.aten

# These prepare memory or read a number, and launch nothing.
NO_KERNEL = {'empty', 'empty_like', 'empty_strided', 'empty_permuted', 'new_empty', 'new_empty_strided',
             'scalar_tensor', '_unsafe_view', '_local_scalar_dense', 'promote_types'}
# These write a tensor without reading what was in it before.
OVERWRITING = {'copy_', 'fill_', 'zero_', 'uniform_', 'normal_', 'bernoulli_', 'exponential_', 'random_'}
# These read as much of their first tensor as they write: the rows that were asked for, not the whole table.
SELECTING = {'embedding', 'index', 'gather', 'index_select'}


# ---------------------------------------------------------------------------------------------- counts
@dataclasses.dataclass(frozen=True)
class Cost:
    """What a piece of code costs.

    Attributes:
        launches: operations that launch a kernel; a few of them launch several, which counts as one.
        bytes: read and written by these, each tensor of each operation once.
        flops: of products and convolutions, a multiplication and an addition counting as two. Attention
            counts without causality, and its backward pass as twice the forward one: what a kernel computes
            again is not counted.
        full_flops: of these, in float32.
        reads: values that the host waits for.
        peak_bytes: most bytes of tensors that were made by this code and alive at once.
    """
    launches: float = 0
    bytes: float = 0
    flops: float = 0
    full_flops: float = 0
    reads: float = 0
    peak_bytes: float = 0

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, factor: float) -> 'Cost':
        return Cost(*(value * factor for value in self.values()))

    def values(self) -> tuple[float, ...]:
        """All counts, in the order of the attributes."""
        return dataclasses.astuple(self)


@contextmanager
def under_one_mask() -> Iterator[None]:
    """A context in which all scales of teacher forcing attend in one call, under a mask over all tokens.

    The formulas count attention like that; by scale it multiplies less.
    """
    kept = scales.MASKED_TOKENS
    scales.block_causal.cache_clear()
    scales.MASKED_TOKENS = 2 ** 30
    try:
        yield
    finally:
        scales.MASKED_TOKENS = kept
        scales.block_causal.cache_clear()


class Counter(TorchDispatchMode):
    """Counts every operation inside `with counter:`; `cost()` is the sum.

    Args:
        answer: what a fake truth value is, where code asks for it. Fake numbers are 0, and a fake mask of
            booleans chooses nothing.
    """

    def __init__(self, answer: bool = False):
        super().__init__()
        self.answer = answer
        self.launches = 0
        self.bytes = 0
        self.flops = 0
        self.full_flops = 0
        self.reads = 0
        self.live_bytes = 0
        self.peak_bytes = 0

    def cost(self) -> Cost:
        """What was counted so far."""
        return Cost(self.launches, self.bytes, self.flops, self.full_flops, self.reads, self.peak_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == 'prim':  # a question, such as where a tensor is
            return func(*args, **kwargs)
        inputs = [*tensors_in(args), *tensors_in(kwargs.values())]
        is_fake = any(t.is_meta or isinstance(t, FakeTensor) for t in inputs)

        # A fake tensor has no values: where code asks for one, a fixed answer stands in.
        if func is aten._local_scalar_dense.default:
            self.reads += 1
            if is_fake:
                return self.answer if args[0].dtype == torch.bool else 0
        if is_fake and func is aten.index.Tensor and _is_mask(args[1][0]):
            return args[0].new_empty(0, *args[0].shape[args[1][0].dim():])

        # Schedules are numbers of the host, which decide what runs.
        if self._is_of_host(func, inputs):
            with _disable_current_modes():
                return func(*args, **kwargs)

        out = func(*args, **kwargs)
        if launches_kernel(func):
            self._add(func, args, kwargs, inputs, out)
        return out

    @staticmethod
    def _is_of_host(func: Any, inputs: list[torch.Tensor]) -> bool:
        """Whether this is the host's own work while the tensors of the device are fake."""
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
            return False
        is_schedule = func is aten.linspace.default
        return is_schedule or (bool(inputs) and not any(isinstance(t, FakeTensor) for t in inputs))

    def _add(self, func: Any, args: tuple, kwargs: dict, inputs: list[torch.Tensor], out: Any) -> None:
        """Count one operation."""
        outputs = list(tensors_in((out,)))
        self.launches += 1
        self.bytes += bytes_moved(func, args, kwargs, inputs, outputs)
        flops = product_flops(func, args, kwargs, out)
        self.flops += flops
        if flops and inputs[0].dtype in (torch.float32, torch.float64):
            self.full_flops += flops
        if not func._schema.is_mutable:
            for t in outputs:
                self._watch(t.untyped_storage())

    def _watch(self, storage: torch.UntypedStorage) -> None:
        """Count memory that was just allocated, until it is freed."""
        num_bytes = storage.nbytes()
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, num_bytes)

    def _free(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def cost_of(run: Callable[[], object], answer: bool = False) -> Cost:
    """What one call costs; `answer`: see `Counter`."""
    with Counter(answer) as counter:
        run()
    return counter.cost()


def extrapolated(cost_at: Callable[..., Cost], depths: tuple[int, ...]) -> Cost:
    """The cost of deep stacks of equal blocks, from two depths of each: it is exact, but for the peak.

    Args:
        cost_at: cost of stacks of the depths that it is called with.
        depths: of each stack, which may be deeper than what one likes to wait for. The first block is never
            the one that is repeated, since it may differ.
    """
    shallow = [min(depth, 2) for depth in depths]
    base = cost_at(*shallow)
    total = base
    for i, depth in enumerate(depths):
        if depth > 2:
            deeper = [*shallow]
            deeper[i] = 3
            block = cost_at(*deeper) + base * -1
            total = total + block * (depth - 2)
    return total


# ---------------------------------------------------------------------------------------------- operations
def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors among the arguments of an operation, and in the lists among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


@functools.cache
def name_of(func: Any) -> str:
    """Name of an operation without its overload, such as 'add_'."""
    return func._schema.name.partition('::')[2]


@functools.cache
def launches_kernel(func: Any) -> bool:
    """Whether an operation runs on the device: it is no view, no allocation, no question about a tensor."""
    schema = func._schema
    returns_tensor = any('Tensor' in str(value.type) for value in schema.returns)
    computes = returns_tensor or schema.is_mutable
    return computes and not func.is_view and name_of(func) not in NO_KERNEL


@functools.cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """(place, name) of the arguments that an operation changes in place."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def stored_bytes(t: torch.Tensor) -> int:
    """Bytes of the elements that a tensor really has: repetitions by `expand` count once."""
    count = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if stride != 0 or size == 0:
            count *= size
    return count


def bytes_moved(func: Any, args: tuple, kwargs: dict, inputs: list[torch.Tensor],
                outputs: list[torch.Tensor]) -> int:
    """Bytes that an operation reads and writes, each of its tensors once."""
    name = name_of(func)
    written = {id(t): t for t in outputs}
    for place, argument in written_arguments(func):
        value = args[place] if place < len(args) else kwargs.get(argument)
        written |= {id(t): t for t in tensors_in((value,))}
    read = {id(t): t for t in inputs}
    num_written = sum(stored_bytes(t) for t in written.values())
    num_read = sum(stored_bytes(t) for t in read.values())
    if name in SELECTING:
        num_read += num_written - stored_bytes(inputs[0])
    if name in OVERWRITING:
        num_read -= stored_bytes(inputs[0])
    return num_read + num_written


def product_flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """FLOPs of a product, by the formulas of `torch.utils.flop_counter`; 0 of any other operation.

    They have no formula for attention on the CPU, and count what its backward pass computes again.
    """
    name = name_of(func)
    if name.startswith('_scaled_dot_product') and not name.endswith('_math'):
        is_backward = name.endswith('_backward')
        q, k, v = args[1:4] if is_backward else args[:3]
        return sdpa_flop_count(q.shape, k.shape, v.shape) * (2 if is_backward else 1)
    # A product into its own tensor, such as addmm_, has the formula of the one into a new tensor.
    packet = getattr(aten, name[:-1], None) if name.endswith('_') else func._overloadpacket
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=out) if formula else 0


# ---------------------------------------------------------------------------------------------- fake tensors
@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, tensors have shapes and no memory, so that models of any size run, and nothing is computed.

    They claim to be on the CPU, where autocast and attention work without a GPU. What CUDA does otherwise is
    counted as on the CPU: its autocast keeps layer norms in float32.
    """
    # Masks are made once and kept: fake ones must not reach real models, nor the other way round.
    scales.block_causal.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        scales.block_causal.cache_clear()


def materialized(module: nn.Module) -> nn.Module:
    """A module that was built on 'meta', with fake weights; to be called inside `fake_tensors`."""
    return module.to_empty(device='cpu')


# ---------------------------------------------------------------------------------------------- cards
class Card(NamedTuple):
    """What a vendor's datasheet says of a GPU, without sparsity.

    Attributes:
        half_flops: FLOP/s of products in bfloat16 and float16.
        full_flops: the same in float32 by way of TF32.
        bandwidth: bytes/s of its memory.
        memory: bytes.
        link: bytes/s from one card to another of the same machine, in one direction: half of what is given
            for NVLink (A100 600 GB/s, H100 and H200 900 GB/s) or for PCIe 4.0 x16 (64 GB/s).
        source: the datasheet.
    """
    half_flops: float
    full_flops: float
    bandwidth: float
    memory: float
    link: float
    source: str


CARDS = {
    'A100-80G': Card(312e12, 156e12, 2.039e12, 80e9, 300e9, 'NVIDIA A100 80GB SXM datasheet'),
    'H100-SXM': Card(989e12, 494e12, 3.35e12, 80e9, 450e9, 'NVIDIA H100 SXM datasheet'),
    'H200': Card(989e12, 494e12, 4.8e12, 141e9, 450e9, 'NVIDIA H200 SXM datasheet'),
    'L40S': Card(362e12, 183e12, 0.864e12, 48e9, 32e9, 'NVIDIA L40S datasheet'),
    'RTX4090': Card(165e12, 82.6e12, 1.008e12, 24e9, 32e9, 'NVIDIA Ada GPU architecture whitepaper'),
}


class Seconds(NamedTuple):
    """The three lower limits of a time, in seconds. This is a model, not a measurement."""
    products: float
    memory: float
    launches: float

    @property
    def total(self) -> float:
        """The largest of the three, as if everything else ran beside it."""
        return max(self)

    @property
    def limit(self) -> str:
        """Which of the three it is."""
        return self._fields[self.index(self.total)]


def seconds_on(card: Card, cost: Cost) -> Seconds:
    """How long a cost takes on a card at best: a model, not a measurement."""
    half_flops = cost.flops - cost.full_flops
    return Seconds(
        products=half_flops / card.half_flops + cost.full_flops / card.full_flops,
        memory=cost.bytes / card.bandwidth,
        launches=cost.launches * LAUNCH_SECONDS,
    )
