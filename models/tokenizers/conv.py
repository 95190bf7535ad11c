"""Convolutional encoder and decoder of the VAR tokenizer.

They go down and up by 2 ** (levels - 1), with attention at the deepest level.
Letters: B batch, C channels, Z code channels, h w feature map.
Source: arXiv 2404.02905 (network of arXiv 2112.10752).
"""
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from models.attention import attend

NUM_GROUPS = 32


def Normalize(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups; `channels` must be a multiple of 32."""
    return nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)


class Downsample2x(nn.Module):
    """Halves the sides: one zero row below and one zero column right, then a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample2x(nn.Module):
    """Doubles the sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode='nearest'))


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions and a shortcut, a 1x1 convolution only where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float):
        super().__init__()
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Normalize(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, 3, 1, C, h * w).permute(1, 0, 4, 2, 3)  # (B, hw, 1 head, C)
        out = attend(q, k, v, backend='sdpa')
        return x + self.proj_out(out.reshape(B, h * w, C).transpose(1, 2).reshape(B, C, h, w))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each at the deepest one, and the resampling."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, dropout: float, with_attn: bool):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out_channels, out_channels, dropout)
                                   for i in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(num_blocks if with_attn else 0))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        for resample in ('downsample', 'upsample'):
            if hasattr(self, resample):
                h = getattr(self, resample)(h)
        return h


class Middle(nn.Module):
    """Residual block, attention, residual block at the deepest resolution."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, Z, H / 2^n, W / 2^n), n = len(ch_mult) - 1.

    Args:
        ch: width of the first level, a multiple of 32.
        ch_mult: width of each level as a multiple of `ch`, finest first.
        num_res_blocks: residual blocks per level.
        dropout: inside residual blocks.
    """

    def __init__(self, *, ch: int = 128, ch_mult: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
                 dropout: float = 0., z_channels: int = 32, in_channels: int = 3):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[i - 1] if i else ch, width, num_res_blocks, dropout, with_attn=i == last)
            if i < last:
                level.downsample = Downsample2x(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], dropout)
        self.norm_out = Normalize(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features (B, Z, h, w) -> images (B, 3, h 2^n, w 2^n), not clamped; arguments as for `Encoder`.

    Each level has one residual block more than the encoder's; `up[i]` is level i, so the deepest runs first.
    """

    def __init__(self, *, ch: int = 128, ch_mult: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
                 dropout: float = 0., z_channels: int = 32, in_channels: int = 3):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, last)], width, num_res_blocks + 1, dropout, with_attn=i == last)
            if i > 0:
                level.upsample = Upsample2x(width)
            self.up.append(level)
        self.norm_out = Normalize(ch * ch_mult[0])
        self.conv_out = nn.Conv2d(ch * ch_mult[0], in_channels, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution, where adaptive loss weights are measured."""
        return self.conv_out.weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
