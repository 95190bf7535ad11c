"""Mixed precision, loss scaling, clipping and accumulation around an optimizer."""
import math
import platform
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import nn
from torch.autograd import Variable

from utils.machine import cpu_features
from utils.sharding import is_sharded, shard_optimizer_state, whole

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of products, by the number of the precision
MAX_SCALE = 32768.  # as published: a larger float16 loss scale is cut back to this
# instruction sets that multiply bfloat16, under the names of Linux
BFLOAT16_X86 = ('amx_bf16', 'avx512_bf16')
BFLOAT16_ARM = ('bf16',)


def autocast(device_type: str, precision: int, keeps_casts: bool = True) -> AbstractContextManager:
    """A context in which products are in float32 (precision 0), float16 (1) or bfloat16 (2).

    Args:
        keeps_casts: whether weights are lowered once and kept until the end; else each time they are used.
    """
    if precision == 0:
        return nullcontext()
    return torch.autocast(device_type, dtype=DTYPES[precision], cache_enabled=keeps_casts)


def bfloat16_on_cpu() -> tuple[bool, str]:
    """Whether products in bfloat16 are fast on this processor, and why or why not.

    A processor that cannot multiply bfloat16 itself takes many times as long as in float32.
    """
    wanted = BFLOAT16_ARM if platform.machine() in ('aarch64', 'arm64') else BFLOAT16_X86
    features = cpu_features()
    found = [name for name in wanted if name in features]
    if features and not found:
        return False, f'the processor lacks {" and ".join(wanted)}'
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False, 'torch has no kernels in bfloat16 for this processor'
    if found:
        return True, f'the processor has {" and ".join(found)}'
    return True, 'torch has kernels in bfloat16 for this processor'


def note_on_bfloat16(device_type: str, precision: int, flag: str) -> str:
    """One line if `precision` is bfloat16 and that is slow on this CPU, else ''.

    Args:
        flag: the flag that precision was set by, without its hyphens.
    """
    if precision != 2 or device_type != 'cpu':
        return ''
    is_fast, reason = bfloat16_on_cpu()
    if is_fast:
        return ''
    return (f'--{flag}=2 takes many times as long as float32 on this CPU ({reason}): pass --{flag}=0, unless '
            'the numbers of bfloat16 are what you want')


class AmpOptimizer:
    """An optimizer with the precision rules of the config.

    Args:
        mixed_precision: 0 float32, 1 float16 with loss scaling, 2 bfloat16.
        optimizer: moves the parameters.
        names: of the trained parameters.
        paras: the trained parameters, for clipping.
        grad_clip: largest norm of the gradient; 0 or less only measures the norm.
        n_gradient_accumulation: micro-steps per step; losses are divided by it.
    Attributes:
        amp_ctx: a context of the precision, for evaluation and sampling.
        step_ctx: the same for training steps: where weights are sharded, no lowered copy of all of them is
            kept.
        moved: whether the last step moved the parameters; a gradient that is not finite moves nothing.
        waiting: is entered where a backward pass waits for the gradients of other ranks; None measures
            nothing.
    """

    def __init__(self, mixed_precision: int, optimizer: torch.optim.Optimizer, names: list[str],
                 paras: list[nn.Parameter], grad_clip: float, n_gradient_accumulation: int = 1):
        self.optimizer = optimizer
        self.names = names
        self.paras = paras
        self.moved = True
        self.waiting: AbstractContextManager | None = None
        self.grad_clip = grad_clip
        self.r_accu = 1 / n_gradient_accumulation
        self.device_type = paras[0].device.type
        self.amp_ctx = autocast(self.device_type, mixed_precision)
        self.step_ctx = self.amp_ctx
        if is_sharded(paras[0]):
            self.step_ctx = autocast(self.device_type, mixed_precision, keeps_casts=False)
        self.scaler = None
        if mixed_precision == 1:
            self.scaler = torch.amp.GradScaler(self.device_type, init_scale=2. ** 11, growth_interval=1000)

    def backward_clip_step(self, stepping: bool,
                           loss: torch.Tensor) -> tuple[torch.Tensor | None, float | None]:
        """Backward; on the last micro-step also clip and step.

        Args:
            stepping: whether this is the last micro-step.
            loss: of this micro-step.
        Returns:
            The gradient norm before clipping, None on other micro-steps; and log2 of the loss scale, None
            unless in float16.
        """
        loss = loss * self.r_accu
        log2_scale = None
        if self.scaler:
            loss = self.scaler.scale(loss)
            log2_scale = math.log2(max(self.scaler.get_scale(), 1e-30))
        self._backward(loss)
        if not stepping:
            return None, log2_scale

        # Gradients are clipped in their own scale, not in that of the loss.
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        max_norm = self.grad_clip if self.grad_clip > 0 else math.inf
        norm = whole(nn.utils.clip_grad_norm_(self.paras, max_norm))

        # A step whose gradient is nan or infinite is left out in every precision, as loss scaling does it in
        # float16. Ranks have exchanged their gradients before, so all of them leave it out.
        self.moved = bool(norm.isfinite())
        if self.scaler:
            if self.moved:
                self.scaler.step(self.optimizer)
            is_too_large = self.scaler.get_scale() > MAX_SCALE
            self.scaler.update(MAX_SCALE if is_too_large else None)
        elif self.moved:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, log2_scale

    def _backward(self, loss: torch.Tensor) -> None:
        """The backward pass, which tells `waiting` where this rank's own part of it ends."""
        if self.waiting is None:
            loss.backward()
            return
        engine = Variable._execution_engine
        with ExitStack() as stack:
            def begin_waiting() -> None:
                stack.enter_context(self.waiting)

            # The hook of the loss is the first one of all. So what it queues for the end of the pass is
            # called when this rank's own gradients are done, and before DDP waits for those of other ranks.
            def queue_first(_: torch.Tensor) -> None:
                engine.queue_callback(begin_waiting)

            loss.register_hook(queue_first)
            loss.backward()

    def forget(self, parameter: nn.Parameter, rows: torch.Tensor) -> None:
        """Set the moments of some rows of a parameter to zero, after these rows were replaced."""
        for value in self.optimizer.state.get(parameter, {}).values():
            if value.shape == parameter.shape:
                value[rows.to(value.device)] = 0

    def state_dict(self) -> dict:
        """State of the optimizer and, in float16, of the loss scaling."""
        state = dict(optimizer=self.optimizer.state_dict())
        if self.scaler:
            state['scaler'] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state; that of a run in another precision may have no loss scaling."""
        self.optimizer.load_state_dict(shard_optimizer_state(state['optimizer'], self.optimizer))
        if self.scaler and 'scaler' in state:
            self.scaler.load_state_dict(state['scaler'])
