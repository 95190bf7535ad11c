"""Layers that several models share: products of single tokens, RMSNorm, rotary positions, sinusoid of a time.

Letters: B batch, L sequence, H heads, d head dim, C width, N rows of a product.
"""
import math

import torch
from torch import nn

FEW_ROWS = 8  # up to here `TokenLinear` computes W x^T


class TokenLinear(nn.Linear):
    """A linear layer without bias for tokens that come one by one, under the weight of `nn.Linear`.

    On a CPU a product with a few rows takes as long as reading the weight does. W x^T reads it in the order
    in which it is stored, which is up to twice as fast as x W^T; both are equal but for rounding.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_NC = x.flatten(0, -2)
        if x.device.type != 'cpu' or len(x_NC) > FEW_ROWS:
            return super().forward(x)
        out_NC = (self.weight @ x_NC.T).T.contiguous()
        return out_NC.unflatten(0, x.shape[:-1])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension in float32, with or without a learnt weight."""

    def __init__(self, width: int, eps: float = 1e-6, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The mean of squares needs float32: in half precision it loses digits, or overflows.
        mean_square = x.float().square().mean(-1, keepdim=True)
        normed = (x.float() * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
        return normed if self.weight is None else normed * self.weight


class Rope2d(nn.Module):
    """Rotary embedding of rows in the first half of the head's channels, of columns in the second.

    Neighbouring channels (a, b) form a pair that turns by the angle position * frequency.

    Args:
        head_dim: d, a multiple of 4. base: of the geometric series of frequencies.
        persistent: whether weights files hold the frequencies.
    """

    def __init__(self, head_dim: int, base: float = 10000., persistent: bool = True):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f'expected a head width that is a multiple of 4, got {head_dim}: '
                             'choose other heads')
        half = head_dim // 2
        freqs = 1 / base ** (torch.arange(0, half, 2).float() / half)  # (d / 4,)
        self.register_buffer('freqs', freqs, persistent)

    def forward(self, positions_L2: torch.Tensor) -> torch.Tensor:
        """(2, L, d / 2) cosines and sines of positions (row, column), for `rotate`."""
        angle_Lp = (positions_L2[:, :, None] * self.freqs).flatten(1)  # rows, then columns
        return torch.stack([angle_Lp.cos(), angle_Lp.sin()])


def rotate(x_BLHd: torch.Tensor, table_2Lp: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels as points, turned by the cosines and sines that `Rope2d` gives, in float32."""
    cos, sin = table_2Lp[:, :, None]
    a, b = x_BLHd.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x_BLHd.dtype)


def sinusoid(index_B: torch.Tensor, width: int) -> torch.Tensor:
    """(B, width): cosines, then sines, of an index times frequencies from 1 down to 1 / 10,000."""
    half = width // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=index_B.device).float() / half)
    angle = index_B[:, None].float() * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
