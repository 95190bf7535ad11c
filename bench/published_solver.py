"""The published solver of FlowAR, to measure ours against.

It integrates a state of the null class along with that of the class at every step, although only their
guided velocity is ever used: twice the evaluations, the same samples.
Letters: B batch, l tokens of one scale, C width, Z latent channels, k scale.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models import FlowAR
from models.helpers import guide


@contextmanager
def both_halves(model: FlowAR) -> Iterator[None]:
    """Inside `with both_halves(model):` the model samples with the published solver."""
    def integrate(x_BlZ: torch.Tensor, z_BlC: torch.Tensor, k: int, scale: float, guidance_until: float,
                  grid: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """As `FlowAR.integrate`: latents (B, l, Z), and evaluations with the class and the null class."""
        B = len(x_BlZ)
        positions_l2 = model.positions(k)
        x = x_BlZ.double().repeat(2, 1, 1)                                                 # (2B, l, Z)
        for t, t_next in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            guided = scale > 1 and t <= guidance_until

            # While it guides, both halves start from the state of the class, and move alike.
            x_in = x[:B].repeat(2, 1, 1) if guided else x
            t_in = torch.full((2 * B,), t, device=x.device)
            v = model.flownet(x_in.float(), t_in, z_BlC, positions_l2).double()            # (2B, l, Z)
            if guided:
                v = guide(*v.chunk(2), scale).repeat(2, 1, 1)
            x = x + (t_next - t) * v
        num_steps = len(grid) - 1
        return x[:B].float(), (num_steps, num_steps)

    model.integrate = integrate
    try:
        yield
    finally:
        del model.integrate
