"""Convolutional encoders and decoders of all tokenizers: one network under the names of each publication.

The published network goes down and up by 2 ** (levels - 1), with attention at the deepest level. The tiny
network goes down and up by 8; it is for 32x32 images on one CPU core.
Letters: B batch, C channels (in, out: of a layer), Z code channels, h w feature map, 3HW image.
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
from models.recompute import Recomputable

NUM_GROUPS = 32


def silu(h: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x) of a tensor that nothing else reads: in place where no gradient needs it."""
    return F.silu(h, inplace=not torch.is_grad_enabled())


class Layout(NamedTuple):
    """Names that a publication gives to the parts of the network: they decide the keys of its weights."""
    down: str                   # the list of encoder levels, finest first
    up: str                     # the list of decoder levels
    block: str                  # the list of residual blocks of one level
    mid: tuple[str, str, str]   # residual block, attention, residual block at the deepest resolution
    fused_qkv: bool             # True: one convolution gives queries, keys and values. False: three
    deepest_first: bool         # True: decoder level 0 is the deepest, which runs first. False: the finest


VAR_LAYOUT = Layout(
    down='down',
    up='up',
    block='block',
    mid=('block_1', 'attn_1', 'block_2'),
    fused_qkv=True,
    deepest_first=False,
)
KL_LAYOUT = VAR_LAYOUT._replace(fused_qkv=False)
LLAMAGEN_LAYOUT = Layout(
    down='conv_blocks',
    up='conv_blocks',
    block='res',
    mid=('0', '1', '2'),
    fused_qkv=False,
    deepest_first=True,
)


# ---------------------------------------------------------------------------------------------- blocks
def Normalize(channels: int, num_groups: int = NUM_GROUPS) -> nn.GroupNorm:
    """Group normalisation; `channels` must be a multiple of `num_groups`."""
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class Downsample2x(nn.Module):
    """(B, C, h, w) -> (B, C, h / 2, w / 2): a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Upstream parity: zeros come in at the right and at the bottom alone, not on all four borders.
        padded = F.pad(x, (0, 1, 0, 1))                                                    # (B, C, h+1, w+1)
        return self.conv(padded)                                                           # (B, C, h/2, w/2)


class Upsample2x(nn.Module):
    """(B, in, h, w) -> (B, out, 2 h, 2 w): nearest neighbour, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2, mode='nearest')                               # (B, in, 2h, 2w)
        return self.conv(x)                                                                # (B, out, 2h, 2w)


class ResnetBlock(Recomputable):
    """(B, in, h, w) -> (B, out, h, w): two normalised 3x3 convolutions beside a shortcut.

    The shortcut is the identity, or a 1x1 convolution where the number of channels changes.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, num_groups: int = NUM_GROUPS):
        super().__init__()
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recomputed('block', self.both_branches, x)                             # (B, out, h, w)

    def both_branches(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` computes, and computes again in the backward pass where that is asked for."""
        h = silu(self.norm1(x))
        h = self.conv1(h)                                                                  # (B, out, h, w)
        h = silu(self.norm2(h))
        h = self.conv2(self.dropout(h))
        return self.nin_shortcut(x) + h                                                    # (B, out, h, w)


class AttnBlock(Recomputable):
    """(B, C, h, w) -> (B, C, h, w): self-attention of one head over all positions, and a residual."""

    def __init__(self, channels: int, fused_qkv: bool):
        super().__init__()
        self.fused_qkv = fused_qkv
        self.norm = Normalize(channels)
        if fused_qkv:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q = nn.Conv2d(channels, channels, 1)
            self.k = nn.Conv2d(channels, channels, 1)
            self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recomputed('block', self.both_branches, x)                             # (B, C, h, w)

    def both_branches(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` computes, and computes again in the backward pass where that is asked for."""
        h = self.norm(x)
        if self.fused_qkv:
            q, k, v = self.qkv(h).chunk(3, dim=1)                                          # 3 x (B, C, h, w)
        else:
            q = self.q(h)
            k = self.k(h)
            v = self.v(h)

        # Every position of the feature map is a token, in row-major order, and there is one head.
        q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(2) for t in (q, k, v))           # (B, h * w, 1, C)
        out = attend(q, k, v, backend='sdpa')                                              # (B, h * w, 1, C)
        out = out.squeeze(2).transpose(1, 2).reshape(x.shape)                              # (B, C, h, w)
        return x + self.proj_out(out)


def Middle(channels: int, dropout: float, layout: Layout) -> nn.Sequential:
    """(B, C, h, w) -> (B, C, h, w) at the deepest resolution: residual block, attention, residual block."""
    parts = (
        ResnetBlock(channels, channels, dropout),
        AttnBlock(channels, layout.fused_qkv),
        ResnetBlock(channels, channels, dropout),
    )
    return nn.Sequential(OrderedDict(zip(layout.mid, parts, strict=True)))


class Level(nn.Module):
    """Residual blocks of one resolution, (B, in, h, w) -> (B, out, h, w), and what follows them.

    A network sets `downsample` or `upsample` on all levels but its last one.

    Args:
        with_attn: attention after each residual block.
    """

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, dropout: float, layout: Layout,
                 with_attn: bool):
        super().__init__()
        self.block_name = layout.block

        # The first block changes the width.
        blocks = nn.ModuleList()
        for i in range(num_blocks):
            channels = in_channels if i == 0 else out_channels
            blocks.append(ResnetBlock(channels, out_channels, dropout))
        self.add_module(layout.block, blocks)

        # An empty list without attention: published keys hold no such part then.
        self.attn = nn.ModuleList()
        if with_attn:
            for _ in range(num_blocks):
                self.attn.append(AttnBlock(out_channels, layout.fused_qkv))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        blocks = getattr(self, self.block_name)
        for i, block in enumerate(blocks):
            h = block(h)                                                                   # (B, out, h, w)
            if len(self.attn):
                h = self.attn[i](h)
        if hasattr(self, 'downsample'):
            h = self.downsample(h)                                                         # half the sides
        if hasattr(self, 'upsample'):
            h = self.upsample(h)                                                           # twice the sides
        return h


# ---------------------------------------------------------------------------------------------- published
class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, Z, H / stride, W / stride), stride = 2 ** (len(ch_mult) - 1).

    Args:
        ch: channels of the first level, a multiple of 32.
        ch_mult: channels of each level as a multiple of `ch`, finest first.
        num_res_blocks: residual blocks per level.
        dropout: probability inside residual blocks, in [0, 1).
        z_channels: Z.
        in_channels: channels of an image.
        layout: names of the parts.
    """

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        dropout: float = 0.,
        z_channels: int = 32,
        in_channels: int = 3,
        layout: Layout = VAR_LAYOUT,
    ):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.stride = 2 ** last
        self.layout = layout

        # 1. from pixels to features
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)

        # 2. levels from the finest to the deepest; all but the deepest halve the sides, and it alone attends,
        #    since attention costs the square of the number of positions
        levels = nn.ModuleList()
        previous_width = ch
        for i, width in enumerate(widths):
            level = Level(previous_width, width, num_res_blocks, dropout, layout, with_attn=i == last)
            if i < last:
                level.downsample = Downsample2x(width)
            levels.append(level)
            previous_width = width
        self.add_module(layout.down, levels)

        # 3. middle, and the way out to Z channels
        self.mid = Middle(widths[-1], dropout, layout)
        self.norm_out = Normalize(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)                                                                # (B, ch, H, W)
        for level in getattr(self, self.layout.down):
            h = level(h)
        h = self.mid(h)                                                                    # (B, C, h, w)
        h = silu(self.norm_out(h))
        return self.conv_out(h)                                                            # (B, Z, h, w)


class Decoder(nn.Module):
    """Features (B, Z, h, w) -> images (B, 3, h * stride, w * stride), not clamped: the mirror of `Encoder`.

    It takes the same arguments. Each level has one residual block more than the encoder's.

    Args:
        with_attn: attention after the residual blocks of the deepest level; the middle always has it.
    """

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        dropout: float = 0.,
        z_channels: int = 32,
        in_channels: int = 3,
        layout: Layout = VAR_LAYOUT,
        with_attn: bool = True,
    ):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.layout = layout

        # 1. from codes to features, and the middle
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout, layout)

        # 2. levels, built from the finest to the deepest, although they run the other way round; all but the
        #    finest double the sides
        levels = []
        for i, width in enumerate(widths):
            deeper_width = widths[min(i + 1, last)]
            level = Level(deeper_width, width, num_res_blocks + 1, dropout, layout,
                          with_attn=with_attn and i == last)
            if i > 0:
                level.upsample = Upsample2x(width, width)
            levels.append(level)
        if layout.deepest_first:
            levels.reverse()
        self.add_module(layout.up, nn.ModuleList(levels))

        # 3. the way out to pixels
        self.norm_out = Normalize(widths[0])
        self.conv_out = nn.Conv2d(widths[0], in_channels, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution: gradients at it decide the adaptive weight of the GAN loss."""
        return self.conv_out.weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(z)                                                                # (B, C, h, w)
        h = self.mid(h)
        levels = getattr(self, self.layout.up)
        if not self.layout.deepest_first:
            levels = reversed(levels)
        for level in levels:
            h = level(h)
        h = silu(self.norm_out(h))                                                       # (B, ch, H, W)
        return self.conv_out(h)                                                            # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------- tiny
TINY_WIDTHS = (24, 48, 48)  # channels after each halving of the sides
TINY_GROUPS = 8


class TinyEncoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, Z, H / 8, W / 8).

    Three times a strided convolution and a residual block. Arguments are as in `Encoder`.
    """

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
        # This memory format makes a step a fifth faster on a CPU.
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.body(x)                                                                   # (B, 48, h, w)
        h = silu(self.norm_out(h))
        return self.conv_out(h)                                                            # (B, Z, h, w)


class TinyDecoder(nn.Module):
    """Features (B, Z, h, w) -> images (B, 3, 8 h, 8 w), not clamped: the mirror of `TinyEncoder`.

    Arguments are as in `Decoder`.
    """

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
        """Weight of the last convolution: gradients at it decide the adaptive weight of the GAN loss."""
        return self.conv_out.weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = z.contiguous(memory_format=torch.channels_last)  # see `TinyEncoder.forward`
        h = self.conv_in(z)                                                                # (B, 48, h, w)
        h = self.body(h)                                                                   # (B, 24, 4h, 4w)
        h = silu(self.norm_out(h))

        # There is no residual block at full resolution, where it would be most expensive.
        h = F.interpolate(h, scale_factor=2, mode='nearest')                               # (B, 24, 8h, 8w)
        return self.conv_out(h)                                                            # (B, 3, 8h, 8w)


# ---------------------------------------------------------------------------------------------- both together
# key of a residual block in any layout: encoder or decoder, number of the level, number of the block
BLOCK_KEY = re.compile(
    r'(encoder|decoder)\.(?:down|up|conv_blocks)\.(\d+)\.(?:block|res)\.(\d+)\.conv1\.weight')


def build_encoder_decoder(
    net: str,
    *,
    ch: int = 128,
    ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
    decoder_ch_mult: Sequence[int] | None = None,
    num_res_blocks: int = 2,
    dropout: float = 0.,
    z_channels: int = 32,
    encoder_channels: int | None = None,
    decoder_attn: bool = True,
    layout: Layout = VAR_LAYOUT,
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of a tokenizer; `encoder.stride` is the pixels per side of a feature.

    Args:
        net: 'published', or 'tiny', which has fixed widths and no attention and hence uses only dropout,
            z_channels and encoder_channels of the arguments below.
        ch: channels of the first level, a multiple of 32.
        ch_mult: channels of each level as a multiple of `ch`, finest first.
        decoder_ch_mult: the same for the decoder; None means `ch_mult`.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        dropout: probability inside residual blocks, in [0, 1).
        z_channels: channels that the decoder takes.
        encoder_channels: channels that the encoder emits; None means `z_channels`.
        decoder_attn: attention at the decoder's deepest level, see `Decoder`.
        layout: names of the parts.
    Raises:
        ValueError: an unknown net, or an encoder and a decoder of different strides.
    """
    decoder_ch_mult = decoder_ch_mult or ch_mult
    encoder_channels = encoder_channels or z_channels
    if net == 'tiny':
        encoder = TinyEncoder(dropout=dropout, z_channels=encoder_channels)
        decoder = TinyDecoder(dropout=dropout, z_channels=z_channels)
        return encoder, decoder

    if net != 'published':
        raise ValueError(f"expected the network 'published' or 'tiny', got {net!r}: pass one of them")
    if len(ch_mult) != len(decoder_ch_mult):
        raise ValueError('encoder and decoder must have equally many levels, got the multipliers '
                         f'{tuple(ch_mult)} and {tuple(decoder_ch_mult)}: pass lists of equal length')
    shared = dict(ch=ch, num_res_blocks=num_res_blocks, dropout=dropout, layout=layout)
    encoder = Encoder(ch_mult=ch_mult, z_channels=encoder_channels, **shared)
    decoder = Decoder(ch_mult=decoder_ch_mult, z_channels=z_channels, with_attn=decoder_attn, **shared)
    return encoder, decoder


def read_encoder_decoder(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments net, ch, ch_mult (of the encoder) and num_res_blocks, from a tokenizer's state dict.

    Args:
        state: weights in any layout.
    Raises:
        KeyError: the weights hold no such network.
    """
    ch_mult = read_ch_mult(state, 'encoder')
    if 'encoder.body.0.weight' in state:
        return dict(net='tiny', ch=TINY_WIDTHS[0], ch_mult=ch_mult, num_res_blocks=1)
    block_numbers = set()
    for key in state:
        match = BLOCK_KEY.fullmatch(key)
        if match and match[1] == 'encoder':
            block_numbers.add(match[3])
    ch = state['encoder.conv_in.weight'].shape[0]
    return dict(net='published', ch=ch, ch_mult=ch_mult, num_res_blocks=len(block_numbers))


def read_ch_mult(state: Mapping[str, torch.Tensor], part: str) -> tuple[int, ...]:
    """Width multiples of the 'encoder' or the 'decoder' (`part`) in a tokenizer's state dict, finest first.

    Raises:
        KeyError: the weights hold no such network.
    """
    if 'encoder.body.0.weight' in state:
        return tuple(width // TINY_WIDTHS[0] for width in TINY_WIDTHS)
    ch = state['encoder.conv_in.weight'].shape[0]

    # All residual blocks of a level emit as many channels, so any of them tells the width.
    widths = {}
    for key, weight in state.items():
        match = BLOCK_KEY.fullmatch(key)
        if match and match[1] == part:
            widths[int(match[2])] = weight.shape[0]
    deepest_first = part == 'decoder' and 'decoder.conv_blocks.0.res.0.conv1.weight' in state
    return tuple(widths[level] // ch for level in sorted(widths, reverse=deepest_first))


def init_convolutions(model: nn.Module) -> None:
    """Set convolutions and group norms to torch's defaults.

    Their constructors do the same, unless a caller has switched `reset_parameters` off, as notebooks do.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=5 ** 0.5)
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def start_as_identity(*layers: nn.Conv2d) -> None:
    """Make convolutions with as many output as input channels pass their input on unchanged.

    A random start shrinks the features; training from scratch then lags by a decibel or two.
    """
    for layer in layers:
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)


def in_float32(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` in at least float32 with autocast off.

    For the layers next to a codebook or a posterior: half precision there would change codes and latents.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(at_least_float32(x))
