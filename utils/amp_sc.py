"""Mixed precision, loss scaling, clipping and accumulation around an optimizer."""
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

MAX_SCALE = 32768.  # as published: a larger float16 loss scale is cut back to this


def autocast(device_type: str, precision: int) -> AbstractContextManager:
    """Inside, products are in float32 (precision 0), float16 (1) or bfloat16 (2)."""
    dtype = {0: None, 1: torch.float16}.get(precision, torch.bfloat16)
    return torch.autocast(device_type, dtype=dtype) if dtype else nullcontext()


class AmpOptimizer:
    """An optimizer with the precision rules of the recipe.

    Args:
        mixed_precision: 0 float32, 1 float16 with loss scaling, 2 bfloat16.
        names, paras: the trained parameters, for clipping.
        grad_clip: maximum gradient norm; <= 0 only measures it.
        n_gradient_accumulation: micro-steps per step; losses are divided by it.
    Attributes:
        moved: whether the last step moved the parameters; a gradient that is not finite moves nothing.
    """

    def __init__(self, mixed_precision: int, optimizer: torch.optim.Optimizer, names: list[str],
                 paras: list[nn.Parameter], grad_clip: float, n_gradient_accumulation: int = 1):
        self.optimizer = optimizer
        self.names = names
        self.paras = paras
        self.moved = True
        self.grad_clip = grad_clip
        self.r_accu = 1 / n_gradient_accumulation
        self.device_type = paras[0].device.type
        self.amp_ctx = autocast(self.device_type, mixed_precision)
        self.scaler = None
        if mixed_precision == 1:
            self.scaler = torch.amp.GradScaler(self.device_type, init_scale=2. ** 11, growth_interval=1000)

    def backward_clip_step(self, stepping: bool,
                           loss: torch.Tensor) -> tuple[torch.Tensor | None, float | None]:
        """Backward, and on the last micro-step clip and step.

        A step whose gradient is nan or infinite is left out in every precision, as float16 with loss scaling
        does. Ranks have exchanged their gradients before, so that all of them leave it out.

        Returns:
            (gradient norm before clipping, log2 of the loss scale); None where there is none: norm on
            micro-steps that do not step, scale unless float16.
        """
        loss = loss * self.r_accu
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        scale = math.log2(max(self.scaler.get_scale(), 1e-30)) if self.scaler else None
        if not stepping:
            return None, scale
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.paras, self.grad_clip if self.grad_clip > 0 else math.inf)
        self.moved = bool(norm.isfinite())
        if self.scaler:
            if self.moved:
                self.scaler.step(self.optimizer)
            self.scaler.update(MAX_SCALE if self.scaler.get_scale() > MAX_SCALE else None)
        elif self.moved:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, scale

    def forget(self, parameter: nn.Parameter, rows: torch.Tensor) -> None:
        """Zero the moments of some rows, after their values were replaced."""
        for value in self.optimizer.state.get(parameter, {}).values():
            if value.shape == parameter.shape:
                value[rows.to(value.device)] = 0

    def state_dict(self) -> dict:
        state = dict(optimizer=self.optimizer.state_dict())
        return state | dict(scaler=self.scaler.state_dict()) if self.scaler else state

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state['optimizer'])
        if self.scaler and 'scaler' in state:
            self.scaler.load_state_dict(state['scaler'])
