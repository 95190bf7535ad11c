"""The published solver of FlowAR, to measure against: a state of the null class moves along, for nothing."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models import FlowAR
from models.helpers import guide


@contextmanager
def both_halves(model: FlowAR) -> Iterator[None]:
    """Inside, `model` samples as published."""
    def integrate(x_BlZ: torch.Tensor, z_BlC: torch.Tensor, k: int, scale: float, guidance_until: float,
                  grid: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        B, positions_l2, x = len(x_BlZ), model.positions(k), x_BlZ.double().repeat(2, 1, 1)
        for t, t_next in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            guided = scale > 1 and t <= guidance_until
            x_in = x[:B].repeat(2, 1, 1) if guided else x
            t_in = torch.full((2 * B,), t, device=x.device)
            v = model.flownet(x_in.float(), t_in, z_BlC, positions_l2).double()
            x = x + (t_next - t) * (guide(*v.chunk(2), scale).repeat(2, 1, 1) if guided else v)
        return x[:B].float(), (len(grid) - 1, len(grid) - 1)
    model.integrate = integrate
    try:
        yield
    finally:
        del model.integrate
