"""Convolutional encoders and decoders of all tokenizers: one network under the names of each publication.

The published network goes down and up by 2 ** (levels - 1), with attention at the deepest level; the tiny
one, for 32x32 images on one CPU core, by 8.
Letters: B batch, C channels, Z code channels, h w feature map, 3HW image.
Source: network of arXiv 2112.10752, used by arXiv 2404.02905 (VAR), 2406.06525 (LlamaGen), 2406.11838 (MAR).
"""
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.attention import attend
from models.base import at_least_float32

NUM_GROUPS = 32


class Layout(NamedTuple):
    """What a publication calls the parts of the network, and hence the keys of its weights."""
    down: str                   # levels of the encoder, finest first
    up: str                     # levels of the decoder
    block: str                  # residual blocks of a level
    mid: tuple[str, str, str]   # residual block, attention, residual block after the levels
    fused_qkv: bool             # one convolution for queries, keys and values, or three
    deepest_first: bool         # is decoder level 0 the deepest one, which runs first, or the finest one


VAR_LAYOUT = Layout('down', 'up', 'block', ('block_1', 'attn_1', 'block_2'), fused_qkv=True,
                    deepest_first=False)
KL_LAYOUT = VAR_LAYOUT._replace(fused_qkv=False)
LLAMAGEN_LAYOUT = Layout('conv_blocks', 'conv_blocks', 'res', ('0', '1', '2'), fused_qkv=False,
                         deepest_first=True)


# ---------------------------------------------------------------------------------------------- blocks
def Normalize(channels: int, num_groups: int = NUM_GROUPS) -> nn.GroupNorm:
    """GroupNorm; `channels` must be a multiple of `num_groups`."""
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class Downsample2x(nn.Module):
    """Halves the sides: one zero row below and one zero column right, then a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample2x(nn.Module):
    """Doubles the sides: nearest neighbour, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode='nearest'))


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions and a shortcut, a 1x1 convolution only where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, num_groups: int = NUM_GROUPS):
        super().__init__()
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Normalize(out_channels, num_groups)
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

    def __init__(self, channels: int, fused_qkv: bool):
        super().__init__()
        self.fused_qkv = fused_qkv
        self.norm = Normalize(channels)
        if fused_qkv:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        qkv = self.qkv(h).chunk(3, dim=1) if self.fused_qkv else (self.q(h), self.k(h), self.v(h))
        q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(2) for t in qkv)  # (B, hw, 1 head, C)
        out = attend(q, k, v, backend='sdpa')
        return x + self.proj_out(out.squeeze(2).transpose(1, 2).reshape(x.shape))


def Middle(channels: int, dropout: float, layout: Layout) -> nn.Sequential:
    """Residual block, attention, residual block at the deepest resolution."""
    parts = (ResnetBlock(channels, channels, dropout), AttnBlock(channels, layout.fused_qkv),
             ResnetBlock(channels, channels, dropout))
    return nn.Sequential(OrderedDict(zip(layout.mid, parts, strict=True)))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each at the deepest one, and the resampling."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, dropout: float, layout: Layout,
                 with_attn: bool):
        super().__init__()
        self.block_name = layout.block
        self.add_module(layout.block, nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, dropout)
            for i in range(num_blocks)))
        self.attn = nn.ModuleList(AttnBlock(out_channels, layout.fused_qkv)
                                  for _ in range(num_blocks if with_attn else 0))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(getattr(self, self.block_name)):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        for resample in ('downsample', 'upsample'):
            if hasattr(self, resample):
                h = getattr(self, resample)(h)
        return h


# ---------------------------------------------------------------------------------------------- published
class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, Z, H / stride, W / stride), stride = 2 ** (len(ch_mult) - 1).

    Args:
        ch: width of the first level, a multiple of 32.
        ch_mult: width of each level as a multiple of `ch`, finest first.
        num_res_blocks: residual blocks per level.
        dropout: inside residual blocks.
    """

    def __init__(self, *, ch: int = 128, ch_mult: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
                 dropout: float = 0., z_channels: int = 32, in_channels: int = 3,
                 layout: Layout = VAR_LAYOUT):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.stride = 2 ** last
        self.layout = layout
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        levels = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[i - 1] if i else ch, width, num_res_blocks, dropout, layout,
                          with_attn=i == last)
            if i < last:
                level.downsample = Downsample2x(width)
            levels.append(level)
        self.add_module(layout.down, levels)
        self.mid = Middle(widths[-1], dropout, layout)
        self.norm_out = Normalize(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in getattr(self, self.layout.down):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features (B, Z, h, w) -> images (B, 3, h * stride, w * stride), not clamped; the mirror of `Encoder`.

    It takes the same arguments; each level has one residual block more than the encoder's.

    Args:
        with_attn: attention after the residual blocks of the deepest level; the middle always has it.
    """

    def __init__(self, *, ch: int = 128, ch_mult: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
                 dropout: float = 0., z_channels: int = 32, in_channels: int = 3, layout: Layout = VAR_LAYOUT,
                 with_attn: bool = True):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.layout = layout
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout, layout)
        levels = []
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, last)], width, num_res_blocks + 1, dropout, layout,
                          with_attn=with_attn and i == last)
            if i > 0:
                level.upsample = Upsample2x(width, width)
            levels.append(level)
        self.add_module(layout.up, nn.ModuleList(levels[::-1] if layout.deepest_first else levels))
        self.norm_out = Normalize(widths[0])
        self.conv_out = nn.Conv2d(widths[0], in_channels, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution, where adaptive loss weights are measured."""
        return self.conv_out.weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z))
        levels = getattr(self, self.layout.up)
        for level in levels if self.layout.deepest_first else reversed(levels):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


# ---------------------------------------------------------------------------------------------- tiny
TINY_WIDTHS = (24, 48, 48)  # after each halving
TINY_GROUPS = 8


class TinyEncoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, Z, H / 8, W / 8): strided convolution, residual block, thrice."""

    stride = 2 ** len(TINY_WIDTHS)

    def __init__(self, *, dropout: float = 0., z_channels: int = 16, in_channels: int = 3):
        super().__init__()
        self.body = nn.Sequential()
        for before, width in pairwise((in_channels, *TINY_WIDTHS)):
            self.body.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            self.body.append(ResnetBlock(width, width, dropout, TINY_GROUPS))
        self.norm_out = Normalize(TINY_WIDTHS[-1], TINY_GROUPS)
        self.conv_out = nn.Conv2d(TINY_WIDTHS[-1], z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x.contiguous(memory_format=torch.channels_last))  # a fifth faster on a CPU
        return self.conv_out(F.silu(self.norm_out(h)))


class TinyDecoder(nn.Module):
    """Features (B, Z, h, w) -> images (B, 3, 8 h, 8 w), not clamped: the mirror of `TinyEncoder`."""

    def __init__(self, *, dropout: float = 0., z_channels: int = 16, in_channels: int = 3):
        super().__init__()
        widths = TINY_WIDTHS[::-1]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.body = nn.Sequential(ResnetBlock(widths[0], widths[0], dropout, TINY_GROUPS))
        for before, width in pairwise(widths):
            self.body.append(Upsample2x(before, width))
            self.body.append(ResnetBlock(width, width, dropout, TINY_GROUPS))
        self.norm_out = Normalize(widths[-1], TINY_GROUPS)
        self.conv_out = nn.Conv2d(widths[-1], in_channels, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution, where adaptive loss weights are measured."""
        return self.conv_out.weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.body(self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        return self.conv_out(F.interpolate(F.silu(self.norm_out(h)), scale_factor=2, mode='nearest'))


# ---------------------------------------------------------------------------------------------- use
BLOCK_KEY = re.compile(  # tower, level and number of a residual block, in any layout
    r'(encoder|decoder)\.(?:down|up|conv_blocks)\.(\d+)\.(?:block|res)\.(\d+)\.conv1\.weight')


def build_encoder_decoder(net: str, *, ch: int = 128, ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
                 decoder_ch_mult: Sequence[int] | None = None, num_res_blocks: int = 2, dropout: float = 0.,
                 z_channels: int = 32, encoder_channels: int | None = None, decoder_attn: bool = True,
                 layout: Layout = VAR_LAYOUT) -> tuple[nn.Module, nn.Module]:
    """(encoder, decoder) of a tokenizer; `encoder.stride` is the pixels per side of a feature.

    Args:
        net: 'published', or 'tiny', which has fixed widths and no attention: of what follows it takes only
            dropout, z_channels and encoder_channels.
        decoder_ch_mult: None means `ch_mult`.
        z_channels: channels between the towers.
        encoder_channels: channels the encoder emits; None means `z_channels`.
        decoder_attn: see `Decoder`.
    Raises:
        ValueError: an unknown net, or towers of different strides.
    """
    decoder_ch_mult = decoder_ch_mult or ch_mult
    encoder_channels = encoder_channels or z_channels
    if net == 'tiny':
        return (TinyEncoder(dropout=dropout, z_channels=encoder_channels),
                TinyDecoder(dropout=dropout, z_channels=z_channels))
    if net != 'published':
        raise ValueError(f"expected the network 'published' or 'tiny', got {net!r}: pass one of them")
    if len(ch_mult) != len(decoder_ch_mult):
        raise ValueError('encoder and decoder must have equally many levels, got the multipliers '
                         f'{tuple(ch_mult)} and {tuple(decoder_ch_mult)}: pass lists of equal length')
    shared = dict(ch=ch, num_res_blocks=num_res_blocks, dropout=dropout, layout=layout)
    return (Encoder(**shared, ch_mult=ch_mult, z_channels=encoder_channels),
            Decoder(**shared, ch_mult=decoder_ch_mult, z_channels=z_channels, with_attn=decoder_attn))


def read_encoder_decoder(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """net, ch, ch_mult (of the encoder) and num_res_blocks of a tokenizer's weights in any layout.

    Raises:
        KeyError: the weights hold no such network.
    """
    if 'encoder.body.0.weight' in state:
        return dict(net='tiny', ch=TINY_WIDTHS[0], ch_mult=read_ch_mult(state, 'encoder'), num_res_blocks=1)
    blocks = {match[3] for match in map(BLOCK_KEY.fullmatch, state) if match and match[1] == 'encoder'}
    return dict(net='published', ch=state['encoder.conv_in.weight'].shape[0],
                ch_mult=read_ch_mult(state, 'encoder'), num_res_blocks=len(blocks))


def read_ch_mult(state: Mapping[str, torch.Tensor], tower: str) -> tuple[int, ...]:
    """Width multiples of the 'encoder' or 'decoder' in a tokenizer's weights, finest first."""
    if 'encoder.body.0.weight' in state:
        return tuple(width // TINY_WIDTHS[0] for width in TINY_WIDTHS)
    ch = state['encoder.conv_in.weight'].shape[0]
    widths = {}
    for match in map(BLOCK_KEY.fullmatch, state):
        if match and match[1] == tower:
            widths[int(match[2])] = state[match[0]].shape[0]
    deepest_first = 'decoder.conv_blocks.0.res.0.conv1.weight' in state and tower == 'decoder'
    return tuple(widths[i] // ch for i in sorted(widths, reverse=deepest_first))


def init_convolutions(model: nn.Module) -> None:
    """torch's defaults for convolutions and norms, even where a caller switched `reset_parameters` off."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=5 ** 0.5)
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def start_as_identity(*layers: nn.Conv2d) -> None:
    """Make convolutions of as many channels in as out pass their input on unchanged.

    A random start shrinks it: training from scratch then lies a decibel or two behind.
    """
    for layer in layers:
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)


def in_float32(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` in at least float32 with autocast off, as next to a codebook or a posterior."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(at_least_float32(x))
