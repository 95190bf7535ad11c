"""FlowAR: next-scale prediction of a continuous latent; a flow-matching head draws the tokens of each scale.

Letters: B batch, K scales, L all tokens, l tokens of one scale, n side of a scale, C width of the trunk,
W width of the head, H heads, d head dim, Z latent channels, 3HW image. Time t runs from 1, noise, to 0, data.
Source: arXiv 2412.15205; step annealing arXiv 2505.20297; loss weighting after arXiv 2310.08442.
"""
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.attention import KVCache, Mask, attend, compile_around_attention
from models.base import ARModel, Tokenizer, num_weights
from models.helpers import drop_labels, guide
from models.layers import RMSNorm, Rope2d, rotate, sinusoid
from models.noise import GlobalBatch, Rng, normal_like
from models.recompute import Recomputable, set_recompute
from models.sampling import sampling_mode
from models.scales import ScaleLayout, about_resizing, block_causal, resize_positions, scale_name

KeysValues = tuple[torch.Tensor, torch.Tensor]  # of a cross-attention, (B, l, H, d) each
TIMES = 1000     # times are told apart in steps of 1 / TIMES
SINUSOID = 256   # width of a time's sinusoid
LOSS_WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'uniform': torch.ones_like,
    # 1 / sqrt(SNR) on the error of the noise, carried over to the velocity and scaled to mean 1
    'debiased': lambda t: 6 * t * (1 - t),
}


def grid_positions(n: int, extent: int, device: torch.device | str | None = None) -> torch.Tensor:
    """(n * n, 2) rows and columns of a scale, rescaled so that every scale spans [0, extent)."""
    ticks = torch.arange(n, device=device) * (extent / n)
    return torch.cartesian_prod(ticks, ticks)


def to_tokens(x_BZnn: torch.Tensor) -> torch.Tensor:
    """(B, n * n, Z), row by row."""
    return x_BZnn.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------- parts
class Attention(nn.Module):
    """Multi-head attention with 2-D rotary positions; `cache` is the slot that `kv_caching` fills."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool, attn_drop: float = 0.,
                 proj_drop: float = 0.):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rope = Rope2d(width // num_heads)
        self.cache: KVCache | None = None

    def forward(self, x_BLC: torch.Tensor, positions_L2: torch.Tensor, attn_bias: Mask = None,
                ) -> torch.Tensor:
        """(B, L, C); attn_bias: see `attend`."""
        return self.project(self.attend(*self.queries_keys_values(x_BLC, positions_L2), attn_bias))

    def queries_keys_values(self, x_BLC: torch.Tensor, positions_L2: torch.Tensor,
                            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of all tokens, (B, L, H, d) each."""
        B, L, _ = x_BLC.shape
        q, k, v = self.qkv(x_BLC).view(B, L, 3, self.num_heads, -1).unbind(2)
        # Positions turn queries and keys, so that their product depends on the distance alone.
        table_2Lp = self.rope(positions_L2)
        return rotate(q, table_2Lp), rotate(k, table_2Lp), v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: Mask) -> torch.Tensor:
        """(B, L, H, d): what each head sees."""
        # While sampling, the queries of a scale also see the keys of all scales before it.
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        dropout_p = self.attn_drop if self.training else 0.
        return attend(q, k, v, bias=attn_bias, dropout_p=dropout_p)

    def project(self, out_BLHd: torch.Tensor) -> torch.Tensor:
        """(B, L, C): what all heads see, mixed."""
        return self.proj_drop(self.proj(out_BLHd.flatten(2)))


class CrossAttention(nn.Module):
    """Attention of the head's tokens to the trunk's conditions of the same scale."""

    def __init__(self, width: int, cond_width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(cond_width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.rope = Rope2d(width // num_heads)

    def keys_values(self, z_BlC: torch.Tensor, positions_l2: torch.Tensor) -> KeysValues:
        """Keys and values (B, l, H, d) of the conditions."""
        B, l, _ = z_BlC.shape
        k, v = self.kv(z_BlC).view(B, l, 2, self.num_heads, -1).unbind(2)
        return rotate(k, self.rope(positions_l2)), v

    def forward(self, x_BlW: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                positions_l2: torch.Tensor) -> torch.Tensor:
        B, l, W = x_BlW.shape
        q = self.q(x_BlW).view(B, l, self.num_heads, -1)
        q = rotate(q, self.rope(positions_l2))
        out = attend(q, k, v)
        return self.proj(out.reshape(B, l, W))                                             # (B, l, W)


class GatedMLP(nn.Module):
    """fc2(gelu(fc1_g(x)) * fc1_x(x)), hidden width int(8 / 3 width) at a ratio of 4."""

    def __init__(self, width: int, mlp_ratio: float, drop: float = 0.):
        super().__init__()
        hidden = int(width * mlp_ratio * 2 / 3.)
        self.fc1_g = nn.Linear(width, hidden)
        self.fc1_x = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.fc1_g(x)) * self.fc1_x(x)
        return self.drop(self.fc2(self.drop(hidden)))


class ModulatedBlock(Recomputable):
    """x after `attn` and `mlp`, each normalised, scaled and shifted before, gated behind."""

    norm: nn.Module
    attn: Attention
    mlp: GatedMLP

    def modulated(self, x_BLC: torch.Tensor, modulation: torch.Tensor, positions_L2: torch.Tensor,
                  attn_bias: Mask = None) -> torch.Tensor:
        """(B, L, C).

        Args:
            modulation: (B, 1 or L, 6 C): two gates, two scales, two shifts.
            attn_bias: see `attend`.
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
        out_BLHd = self.recomputed('attention', self.attended, x_BLC, scale1, shift1, positions_L2, attn_bias)
        return self.after_attention(x_BLC, out_BLHd, gamma1, scale2, shift2, gamma2)

    def attended(self, x_BLC: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor,
                 positions_L2: torch.Tensor, attn_bias: Mask) -> torch.Tensor:
        """(B, L, H, d): what each head sees, given the tokens as they enter the block."""
        q, k, v = self.before_attention(x_BLC, scale, shift, positions_L2)
        return self.attn.attend(q, k, v, attn_bias)

    def before_attention(self, x_BLC: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor,
                         positions_L2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Attention.queries_keys_values`, of the normalised and modulated tokens."""
        h_BLC = self.norm(x_BLC) * (1 + scale) + shift
        return self.attn.queries_keys_values(h_BLC, positions_L2)

    def after_attention(self, x_BLC: torch.Tensor, out_BLHd: torch.Tensor, attn_gamma: torch.Tensor,
                        mlp_scale: torch.Tensor, mlp_shift: torch.Tensor,
                        mlp_gamma: torch.Tensor) -> torch.Tensor:
        """The tokens with both branches added, each gated."""
        x_BLC = x_BLC + attn_gamma * self.attn.project(out_BLHd)
        h_BLC = self.norm(x_BLC) * (1 + mlp_scale) + mlp_shift
        return x_BLC + mlp_gamma * self.mlp(h_BLC)


class TrunkBlock(ModulatedBlock):
    """A block of the trunk: the class embedding modulates all tokens alike."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, attn_drop: float, proj_drop: float):
        super().__init__()
        self.norm = RMSNorm(width, affine=False)
        self.attn = Attention(width, num_heads, True, attn_drop, proj_drop)
        self.mlp = GatedMLP(width, mlp_ratio, proj_drop)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, cond_BC: torch.Tensor) -> torch.Tensor:
        """(B, 1, 6 C) of the class embedding."""
        return self.ada_lin(cond_BC)[:, None]

    def forward(self, x_BLC: torch.Tensor, cond_BC: torch.Tensor, positions_L2: torch.Tensor,
                attn_bias: Mask = None) -> torch.Tensor:
        return self.recomputed('block', self.conditioned, x_BLC, cond_BC, positions_L2, attn_bias)

    def conditioned(self, x_BLC: torch.Tensor, cond_BC: torch.Tensor, positions_L2: torch.Tensor,
                    attn_bias: Mask) -> torch.Tensor:
        """What `forward` computes, and computes again in the backward pass where that is asked for."""
        return self.modulated(x_BLC, self.modulation(cond_BC), positions_L2, attn_bias)    # (B, L, C)


class HeadConditions(NamedTuple):
    """What the head needs of the trunk's conditions; the same at all times of a scale."""
    c_BlW: torch.Tensor                         # the conditions at the width of the head
    keys_values: tuple[KeysValues | None, ...]  # per block, None where it has no cross-attention

    def of_first(self, batch: int) -> 'HeadConditions':
        """Those of the first `batch` images."""
        keys_values = []
        for pair in self.keys_values:
            keys_values.append(pair and (pair[0][:batch], pair[1][:batch]))
        return HeadConditions(self.c_BlW[:batch], tuple(keys_values))


class AttnMLP(ModulatedBlock):
    """The head's first kind of block: time and condition modulate every token."""

    def __init__(self, width: int, cond_width: int, num_heads: int):
        super().__init__()
        self.norm = RMSNorm(width, affine=False)
        self.attn = Attention(width, num_heads, qkv_bias=False)
        self.mlp = GatedMLP(width, 4.)
        self.ada_lin = nn.Linear(width, 6 * width)

    def keys_values(self, z_BlC: torch.Tensor, positions_l2: torch.Tensor) -> None:
        """This kind of block has no cross-attention."""

    def forward(self, x_BlW: torch.Tensor, t_B1W: torch.Tensor, c_BlW: torch.Tensor,
                keys_values: None, positions_l2: torch.Tensor) -> torch.Tensor:
        return self.recomputed('block', self.conditioned, x_BlW, t_B1W, c_BlW, positions_l2)

    def conditioned(self, x_BlW: torch.Tensor, t_B1W: torch.Tensor, c_BlW: torch.Tensor,
                    positions_l2: torch.Tensor) -> torch.Tensor:
        """What `forward` computes, and computes again in the backward pass where that is asked for."""
        modulation_BlW = self.ada_lin(F.silu(t_B1W + c_BlW))                               # (B, l, 6 W)
        return self.modulated(x_BlW, modulation_BlW, positions_l2)                         # (B, l, W)


class AttnCrossAttnMLP(Recomputable):
    """The head's second kind of block: time modulates the attention, which cross-attention to z follows."""

    def __init__(self, width: int, cond_width: int, num_heads: int):
        super().__init__()
        self.norm = RMSNorm(width, affine=False)
        self.attn = Attention(width, num_heads, qkv_bias=False)
        self.crossattn = CrossAttention(width, cond_width, num_heads)
        self.norm2_1 = RMSNorm(width)
        self.norm2_2 = RMSNorm(cond_width)
        self.mlp = GatedMLP(width, 4.)
        self.ada_lin_attn = nn.Linear(width, 3 * width)
        self.ada_lin_mlp = nn.Linear(width, 3 * width)

    def keys_values(self, z_BlC: torch.Tensor, positions_l2: torch.Tensor) -> KeysValues:
        """Of the cross-attention to the trunk's conditions."""
        return self.crossattn.keys_values(self.norm2_2(z_BlC), positions_l2)

    def forward(self, x_BlW: torch.Tensor, t_B1W: torch.Tensor, c_BlW: torch.Tensor,
                keys_values: KeysValues, positions_l2: torch.Tensor) -> torch.Tensor:
        return self.recomputed('block', self.conditioned, x_BlW, t_B1W, c_BlW, keys_values, positions_l2)

    def conditioned(self, x_BlW: torch.Tensor, t_B1W: torch.Tensor, c_BlW: torch.Tensor,
                    keys_values: KeysValues, positions_l2: torch.Tensor) -> torch.Tensor:
        """What `forward` computes, and computes again in the backward pass where that is asked for."""
        # Self-attention knows the time alone,
        gamma1, scale1, shift1 = self.ada_lin_attn(F.silu(t_B1W)).chunk(3, dim=-1)         # (B, 1, W) each
        out_BlHd = self.recomputed('attention', self.attended, x_BlW, scale1, shift1, positions_l2)
        x_BlW = x_BlW + gamma1 * self.attn.project(out_BlHd)                               # (B, l, W)

        # cross-attention brings in what the trunk says of all tokens of the scale,
        x_BlW = x_BlW + self.crossattn(self.norm2_1(x_BlW), *keys_values, positions_l2)

        # and the feed-forward network knows both, token by token.
        time_and_condition_BlW = F.silu(t_B1W + c_BlW)
        gamma2, scale2, shift2 = self.ada_lin_mlp(time_and_condition_BlW).chunk(3, dim=-1)  # (B, l, W) each
        h_BlW = self.norm(x_BlW) * (1 + scale2) + shift2
        return x_BlW + gamma2 * self.mlp(h_BlW)                                            # (B, l, W)

    def attended(self, x_BlW: torch.Tensor, scale_B1W: torch.Tensor, shift_B1W: torch.Tensor,
                 positions_l2: torch.Tensor) -> torch.Tensor:
        """(B, l, H, d): what each head of the self-attention sees, given the tokens as they enter."""
        h_BlW = self.norm(x_BlW) * (1 + scale_B1W) + shift_B1W
        return self.attn.attend(*self.attn.queries_keys_values(h_BlW, positions_l2), attn_bias=None)


class TimeEmbedder(nn.Module):
    """(B, W) of times in [0, 1], which are told apart in steps of 1 / TIMES."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: torch.Tensor) -> torch.Tensor:
        # In float32 on purpose: 0.65 is step 650 there, 649 in float64.
        index_B = (t_B.float() * TIMES).long()
        return self.mlp(sinusoid(index_B, SINUSOID))                                       # (B, W)


class FinalLayer(nn.Module):
    """Modulated norm and projection to the latent's channels."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = RMSNorm(width, affine=False)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BlW: torch.Tensor, cond_BlW: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(cond_BlW).chunk(2, dim=-1)                    # (B, l, W) each
        return self.linear(self.norm(x_BlW) * (1 + scale) + shift)                         # (B, l, Z)


class FlowHead(nn.Module):
    """Velocity of the noisy tokens of one scale, given the time and the trunk's conditions.

    Args:
        channels: Z. width: W. cond_width: C. depth: blocks.
        cross: blocks with cross-attention (L and H) instead of plain ones (S).
    """

    def __init__(self, channels: int, width: int, cond_width: int, depth: int, cross: bool):
        super().__init__()
        num_heads = max(width // 64, 1)
        self.width = width
        self.cross = cross
        self.time_embed = TimeEmbedder(width)
        self.cond_embed = nn.Linear(cond_width, width)
        self.input_proj = nn.Linear(channels, width)
        block = AttnCrossAttnMLP if cross else AttnMLP
        self.res_blocks = nn.ModuleList(block(width, cond_width, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, channels)

    def forward(self, x_BlZ: torch.Tensor, t_B: torch.Tensor, z_BlC: torch.Tensor,
                positions_l2: torch.Tensor) -> torch.Tensor:
        """(B, l, Z)."""
        return self.velocity(x_BlZ, t_B, self.conditions(z_BlC, positions_l2), positions_l2)

    def compile(self, **options: Any) -> None:
        """Compile what a step of the solver, or of the training, evaluates."""
        self.velocity = torch.compile(self.velocity, **options)

    def conditions(self, z_BlC: torch.Tensor, positions_l2: torch.Tensor) -> HeadConditions:
        """What the head needs of the trunk's conditions: sampling makes it once for all Euler steps."""
        keys_values = tuple(block.keys_values(z_BlC, positions_l2) for block in self.res_blocks)
        return HeadConditions(self.cond_embed(z_BlC), keys_values)

    def forward_flops(self, l: int) -> int:
        """2 N l + 4 l^2 W (attentions) + 2 M: FLOPs of the products of `forward` for a scale of an image.

        N weights multiply each of its tokens, M weights the time alone.
        """
        of_time = [self.time_embed]
        num_attentions = len(self.res_blocks)
        if self.cross:
            of_time += [block.ada_lin_attn for block in self.res_blocks]
            num_attentions *= 2
        M = num_weights(*of_time)
        N = num_weights(self) - M
        return 2 * N * l + 4 * l * l * self.width * num_attentions + 2 * M

    def velocity(self, x_BlZ: torch.Tensor, t_B: torch.Tensor, conditions: HeadConditions,
                 positions_l2: torch.Tensor) -> torch.Tensor:
        """`forward`, given the `conditions`."""
        t_B1W = self.time_embed(t_B)[:, None]                                              # (B, 1, W)
        x_BlW = self.input_proj(x_BlZ)                                                     # (B, l, W)
        c_BlW = conditions.c_BlW                                                           # (B, l, W)
        for block, keys_values in zip(self.res_blocks, conditions.keys_values, strict=True):
            x_BlW = block(x_BlW, t_B1W, c_BlW, keys_values, positions_l2)
        return self.final_layer(x_BlW, t_B1W + c_BlW)                                      # (B, l, Z)


class ScaleStep(NamedTuple):
    """What sampling one scale produced."""
    k: int
    latent_BZnn: torch.Tensor
    evaluations: tuple[int, int]  # of the head: conditional, null


def time_grid(num_steps: int) -> torch.Tensor:
    """Times of the Euler solver, float64, from 1 to 0.

    Fifty steps are uniform; any other number takes half of them from 1 to 0.3 and the rest from 0.25 to 0, so
    that an odd number makes one step less.

    Raises:
        ValueError: fewer than two steps, which would return noise.
    """
    if num_steps < 2:
        raise ValueError(f'expected at least 2 steps of the flow head, got {num_steps}: pass 25 or so')
    if num_steps == 50:
        return torch.linspace(1, 0, 51, dtype=torch.float64)
    half = num_steps // 2
    return torch.cat([torch.linspace(1, 0.3, half, dtype=torch.float64),
                      torch.linspace(0.25, 0, half + 1, dtype=torch.float64)])


def annealed_steps(upper: int, lower: int, num_scales: int) -> list[int]:
    """Steps per scale, falling linearly from `upper` at the first to `lower` at the last (DiSA)."""
    last = num_scales - 1
    steps = []
    for k in range(num_scales):
        steps.append(int((upper - lower) * (last - k) / max(last, 1) + lower))
    return steps


# ---------------------------------------------------------------------------------------------- model
class FlowAR(ARModel):
    """Scale-wise transformer with a flow-matching head.

    Args:
        vae_local: frozen tokenizer (KL-16), kept as a plain reference.
        num_classes: classes; index num_classes is the null class of classifier-free guidance.
        encoder_embed_dim, encoder_depth, encoder_num_heads, decoder_embed_dim, decoder_depth,
            decoder_num_heads, mlp_ratio: of the two stacks of the trunk, which have one width.
        label_drop_prob: share of labels replaced by the null class in training.
        attn_dropout, proj_dropout: of the trunk.
        diffloss_d, diffloss_w, cross: depth, width and kind of the head, see `FlowHead`.
        scale: sides of the scales, coarse to fine; published: powers of two.
        use_checkpoint: recompute the trunk's blocks in the backward pass, to save memory; `set_recompute`
            reaches those of the head, too.
        loss_weighting: a key of `LOSS_WEIGHTS`.
        buffer_size, patch_size: other values than 0 and 1 never worked in the published code.
    Raises:
        ValueError: unequal widths, sides that do not rise from 1, or an unsupported value.
    """

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {  # of both stacks; whether the head has cross-attention
        'small': dict(width=768, depth=6, num_heads=12, cross=False),
        'large': dict(width=1024, depth=8, num_heads=16, cross=True),
        'huge': dict(width=1536, depth=15, num_heads=16, cross=True),
    }
    headline = {'L': 'L_mean', 'Lt': 'L_tail'}
    legend = 'L is the squared error of the velocity over all scales, Lt that of the finest scale'
    selection = 'L_mean'
    parts = dict(
        class_emb=('class_emb.*',),
        pos=('*_pos_embed_learned',),
        trunk=('encoder_*.*', 'decoder_*.*'),
        head=('flownet.*',),
    )

    def __init__(
        self,
        vae_local: Tokenizer,
        num_classes: int = 1000,
        encoder_embed_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_num_heads: int = 16,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.,
        label_drop_prob: float = 0.1,
        attn_dropout: float = 0.,
        proj_dropout: float = 0.,
        diffloss_d: int = 3,
        diffloss_w: int = 1024,
        scale: Sequence[int] = (1, 2, 4, 8, 16),
        cross: bool = False,
        use_checkpoint: bool = False,
        loss_weighting: str = 'uniform',
        buffer_size: int = 0,
        patch_size: int = 1,
    ):
        super().__init__(vae_local)
        # 0. hyper-parameters
        if encoder_embed_dim != decoder_embed_dim:
            raise ValueError('the class embedding modulates both stacks: expected equal widths, got '
                             f'{encoder_embed_dim} and {decoder_embed_dim}')
        if buffer_size or patch_size != 1:
            raise ValueError(f'only buffer_size=0 and patch_size=1 are supported, got {buffer_size} and '
                             f'{patch_size}: leave them out')
        if not scale or scale[0] != 1 or list(scale) != sorted(set(scale)):
            raise ValueError(f'expected sides of scales that rise from 1, got {tuple(scale)}')
        if loss_weighting not in LOSS_WEIGHTS:
            raise ValueError(f'loss_weighting must be one of {", ".join(LOSS_WEIGHTS)}, '
                             f'got {loss_weighting!r}')
        self.num_classes = num_classes
        self.label_drop_prob = label_drop_prob
        self.loss_weighting = loss_weighting
        self.C = encoder_embed_dim
        self.Z = vae_local.channels
        self.layout = ScaleLayout(tuple(scale))

        # 1. input: class token, then the resized coarser scale
        self.class_emb = nn.Embedding(num_classes + 1, self.C)
        self.z_proj = nn.Linear(self.Z, self.C)
        self.z_proj_ln = RMSNorm(self.C)

        # 2. absolute positions of every token, before each stack and after the last
        def positions() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, self.layout.total, self.C))
        self.encoder_pos_embed_learned = positions()
        self.decoder_pos_embed_learned = positions()
        self.diffusion_pos_embed_learned = positions()

        # 3. trunk
        def stack(depth: int, num_heads: int) -> nn.ModuleList:
            return nn.ModuleList(TrunkBlock(self.C, num_heads, mlp_ratio, attn_dropout, proj_dropout)
                                 for _ in range(depth))
        self.encoder_blocks = stack(encoder_depth, encoder_num_heads)
        self.encoder_norm = RMSNorm(self.C)
        self.decoder_embed = nn.Linear(self.C, self.C)
        self.decoder_blocks = stack(decoder_depth, decoder_num_heads)
        self.decoder_norm = RMSNorm(self.C)
        if use_checkpoint:
            set_recompute(self.encoder_blocks, 'block')
            set_recompute(self.decoder_blocks, 'block')
        self.register_buffer('mask', self.layout.causal_bias()[None, None])  # for its published key alone

        # 4. flow head
        self.flownet = FlowHead(self.Z, diffloss_w, self.C, diffloss_d, cross)
        self.init_weights()

    # ------------------------------------------------------------------------------ scales
    def pyramid(self, latent_BZhw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets (B, L, Z) of all scales, and inputs (B, L - 1, Z) of all but the first.

        Raises:
            ValueError: the latent has another size than the last scale.
        """
        side = self.layout.patch_nums[-1]
        if latent_BZhw.shape[2:] != (side, side):
            given = scale_name(latent_BZhw.shape[2:])
            raise ValueError(f'expected latents of {side}x{side}, got {given}: train on images or a cache of '
                             'that size, or pass --img_size')
        # A scale's target is the latent, averaged to its side; its input is the target of the scale before.
        targets = []
        inputs = [latent_BZhw.new_empty(len(latent_BZhw), 0, self.Z)]  # the first scale has none
        for k, n in enumerate(self.layout.patch_nums):
            target_BZnn = F.interpolate(latent_BZhw, size=(n, n), mode='area')
            targets.append(to_tokens(target_BZnn))
            if n < side:
                inputs.append(self.next_input(target_BZnn, k))
        return torch.cat(targets, dim=1), torch.cat(inputs, dim=1)

    def next_input(self, x_BZnn: torch.Tensor, k: int) -> torch.Tensor:
        """(B, next l, Z): scale k brought to full size, then averaged to the size of the next scale."""
        full = self.layout.patch_nums[-1]
        n = self.layout.patch_nums[k + 1]
        large = F.interpolate(x_BZnn, size=(full, full), mode='bicubic')
        return to_tokens(F.interpolate(large, size=(n, n), mode='area'))

    def positions(self, k: int | None = None) -> torch.Tensor:
        """(l, 2) positions of scale k, or (L, 2) of all."""
        sides = self.layout.patch_nums if k is None else self.layout.patch_nums[k:k + 1]
        return torch.cat([grid_positions(n, self.layout.patch_nums[-1], self.device) for n in sides])

    # ------------------------------------------------------------------------------ training
    def training_loss(self, images_B3HW: torch.Tensor, label_B: torch.Tensor,
                      progress: float = 1.) -> tuple[torch.Tensor, dict[str, Any]]:
        """Squared error of the velocity at random times; every token counts the same."""
        # Teacher forcing: a scale sees the true coarser one, resized to its own side.
        latent_BZhw = self.tokenizer.encode(images_B3HW)
        target_BLZ, teacher_BLZ = self.pyramid(latent_BZhw)
        if self.training:
            label_B = drop_labels(label_B, self.num_classes, self.label_drop_prob)

        # A time and a noise for every image and scale, drawn for the global batch so that neither ranks nor
        # micro-steps matter.
        B = len(label_B)
        device = label_B.device
        batch = GlobalBatch.current
        times = []
        noises = []
        for length in self.layout.lengths:
            times.append(batch.per_image(B, device, lambda t: t.uniform_()))
            noises.append(batch.per_image(B, device, lambda t: t.normal_(), (length, self.Z)))
        t_KB = torch.stack(times)
        noise_BLZ = torch.cat(noises, dim=1)
        batch.reseed_per_rank()

        # The trunk says what each token is like, the flow head how noise moves towards it.
        z_BLC = self(label_B, teacher_BLZ)
        error_KB = self.velocity_error(target_BLZ, z_BLC, t_KB, noise_BLZ)
        aux = dict(error_KB=error_KB.detach(), t_KB=t_KB, num_tokens=target_BLZ.shape[1])
        return self.total_loss(error_KB, t_KB), aux

    def velocity_error(self, target_BLZ: torch.Tensor, z_BLC: torch.Tensor, t_KB: torch.Tensor,
                       noise_BLZ: torch.Tensor) -> torch.Tensor:
        """(K, B) mean squared error of the head's velocity on x_t = (1 - t) x + t noise."""
        errors = []
        for k, (begin, end) in enumerate(self.layout.spans):
            x_BlZ = target_BLZ[:, begin:end]
            noise_BlZ = noise_BLZ[:, begin:end]
            t_B = t_KB[k]
            # A straight path from data to noise, whose velocity is noise - x at all times.
            t_B11 = t_B[:, None, None]
            x_t_BlZ = (1 - t_B11) * x_BlZ + t_B11 * noise_BlZ
            v_BlZ = self.flownet(x_t_BlZ, t_B, z_BLC[:, begin:end], self.positions(k))
            error_BlZ = v_BlZ.float() - (noise_BlZ - x_BlZ)
            errors.append(error_BlZ.square().mean((1, 2)))
        return torch.stack(errors)

    def total_loss(self, error_KB: torch.Tensor, t_KB: torch.Tensor) -> torch.Tensor:
        """Sum over scales, weighted by their tokens over those of the last, times the weight of the time."""
        weight_K1 = error_KB.new_tensor(self.layout.lengths)[:, None] / self.layout.lengths[-1]
        weight_of_time_KB = LOSS_WEIGHTS[self.loss_weighting](t_KB)
        return (weight_K1 * weight_of_time_KB * error_KB).sum(0).mean()

    def forward(self, label_B: torch.Tensor, teacher_BLZ: torch.Tensor) -> torch.Tensor:
        """Conditions z (B, L, C) of the flow head, one per token.

        Args:
            label_B: (B,) int64 in [0, num_classes].
            teacher_BLZ: inputs of all scales but the first, see `pyramid`.
        """
        cond_BC = self.class_emb(label_B)                                                  # (B, C)
        # The first scale has nothing to see but the class, which is its start token.
        x_BLC = torch.cat([cond_BC[:, None], self.z_proj(teacher_BLZ)], dim=1)             # (B, L, C)
        mask = block_causal(self.layout, x_BLC.device)
        return self.trunk(x_BLC, cond_BC, self.positions(), slice(None), mask)

    def trunk(self, x_BlC: torch.Tensor, cond_BC: torch.Tensor, positions_l2: torch.Tensor, span: slice,
              attn_bias: Mask = None) -> torch.Tensor:
        """Both stacks over the tokens `span` of the sequence."""
        # The stacks are named after those of MAR; here both are causal over the scales.
        x_BlC = self.z_proj_ln(x_BlC + self.encoder_pos_embed_learned[:, span])            # (B, l, C)
        x_BlC = self.run(self.encoder_blocks, x_BlC, cond_BC, positions_l2, attn_bias)
        x_BlC = self.encoder_norm(x_BlC)
        x_BlC = self.decoder_embed(x_BlC) + self.decoder_pos_embed_learned[:, span]
        x_BlC = self.run(self.decoder_blocks, x_BlC, cond_BC, positions_l2, attn_bias)
        x_BlC = self.decoder_norm(x_BlC)
        # The flow head is told the position of each token once more.
        return x_BlC + self.diffusion_pos_embed_learned[:, span]                           # (B, l, C)

    def run(self, blocks: nn.ModuleList, x_BlC: torch.Tensor, *args: torch.Tensor | None) -> torch.Tensor:
        """`x_BlC` after all blocks."""
        for block in blocks:
            x_BlC = block(x_BlC, *args)
        return x_BlC

    # ------------------------------------------------------------------------------ sampling
    @property
    def native_side(self) -> int:
        return self.layout.patch_nums[-1] * self.tokenizer.stride

    @torch.no_grad()
    def sample_scales(self, label_B: torch.Tensor, *, cfg: float = 1., guidance_until: float = 0.9,
                      num_steps: int = 25, lower_steps: int | None = None,
                      rng: Rng = None) -> Iterator[ScaleStep]:
        """Sample scale by scale, one step for each; in eval mode whatever the model's mode is.

        Args:
            label_B: (B,) int64, see `as_labels`.
            cfg: guidance scale s at the last scale; it grows linearly from 1, off, at the first. 1 and less
                guide nothing.
            guidance_until: times from 0 to this one are guided; published as `guidance`.
            num_steps: of the solver, see `time_grid`.
            lower_steps: of the last scale, see `annealed_steps`; None anneals nothing.
            rng: a generator, `ImageNoise`, or None for torch's global generator.
        """
        num_scales = len(self.layout.patch_nums)
        if lower_steps is None:
            lower_steps = num_steps
        grids = [time_grid(n) for n in annealed_steps(num_steps, lower_steps, num_scales)]
        B = len(label_B)

        # With guidance the second half of the batch has the null class.
        num_copies = 1
        if cfg > 1:
            num_copies = 2
            null_B = torch.full_like(label_B, self.num_classes)
            label_B = torch.cat([label_B, null_B])
        cond_BC = self.class_emb(label_B)                                                  # (2B, C)
        x_BlC = cond_BC[:, None]
        blocks = [*self.encoder_blocks, *self.decoder_blocks]
        with sampling_mode(self, blocks, capacity=self.layout.num_seen_later):
            for k, n in enumerate(self.layout.patch_nums):
                # 1. One pass of the trunk over all tokens of the scale. There is no mask: the cache holds
                #    the coarser scales alone, and all of them may be seen.
                span = slice(*self.layout.spans[k])
                z_BlC = self.trunk(x_BlC, cond_BC, self.positions(k), span)                # (2B, n^2, C)

                # 2. Euler steps of the flow head from noise to the latent of the scale, guided more
                #    strongly from scale to scale.
                scale = 1 + (cfg - 1) * self.layout.ratio(k)
                noise_BlZ = normal_like(x_BlC.new_empty(B, n * n, self.Z, dtype=torch.float32), rng)
                tokens_BlZ, evaluations = self.integrate(noise_BlZ, z_BlC, k, scale, guidance_until,
                                                         grids[k])
                latent_BZnn = tokens_BlZ.transpose(1, 2).reshape(B, self.Z, n, n)
                yield ScaleStep(k, latent_BZnn, evaluations)

                # 3. The next scale sees this one, resized.
                if k < num_scales - 1:
                    x_BlC = self.z_proj(self.next_input(latent_BZnn, k)).repeat(num_copies, 1, 1)

    def integrate(self, x_BlZ: torch.Tensor, z_BlC: torch.Tensor, k: int, scale: float,
                  guidance_until: float, grid: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Euler's method from noise to the tokens of scale k, in float64.

        The published sampler also moves a state of the null class, which never reaches the result: here the
        null class is evaluated where it guides, and nowhere else.

        Args:
            z_BlC: conditions of the labels, followed by those of the null class if there is guidance.
        Returns:
            (tokens (B, l, Z) float32, evaluations of the head with label and without).
        """
        B = len(x_BlZ)
        positions_l2 = self.positions(k)
        x = x_BlZ.double()
        num_null = 0
        # What the head needs of the trunk is the same at all times: for both halves, and for the labels.
        of_both = self.flownet.conditions(z_BlC, positions_l2)
        of_labels = of_both.of_first(B)
        for t, t_next in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            # Guidance acts late, at small times, where the latent has taken shape.
            guided = scale > 1 and t <= guidance_until
            num_copies = 2 if guided else 1
            x_in = x.float().repeat(num_copies, 1, 1)
            t_in = torch.full((len(x_in),), t, device=x.device)
            conditions = of_both if guided else of_labels
            v = self.flownet.velocity(x_in, t_in, conditions, positions_l2).double()
            if guided:
                cond, uncond = v.chunk(2)
                v = guide(cond, uncond, scale)
                num_null += 1
            x = x + (t_next - t) * v
        return x.float(), (len(grid) - 1, num_null)

    def sample(self, labels: torch.Tensor | Sequence[int], *, guidance: float = 1., rng: Rng = None,
               **options: Any) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1]; guidance is the published cfg; options: see `sample_scales`."""
        label_B = self.as_labels(labels, len(labels), rng)
        for step in self.sample_scales(label_B, cfg=guidance, rng=rng, **options):
            latent = step.latent_BZnn
        return self.tokenizer.decode(latent).add(1).mul(0.5)

    @torch.no_grad()
    def growing(self, labels: torch.Tensor | Sequence[int], *, guidance: float = 1., rng: Rng = None,
                **options: Any) -> Iterator[torch.Tensor]:
        """Images (B, 3, h, w) in [0, 1] of the latent of each scale, at its own size; see `sample`."""
        label_B = self.as_labels(labels, len(labels), rng)
        for step in self.sample_scales(label_B, cfg=guidance, rng=rng, **options):
            yield self.tokenizer.decode(step.latent_BZnn).add(1).mul(0.5)

    # ------------------------------------------------------------------------------ metrics
    @torch.no_grad()
    def metrics(self, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The loss without weighting by time, and the error of every scale, named by its side in pixels."""
        error_K = aux['error_KB'].mean(1)
        weight_K = error_K.new_tensor(self.layout.lengths) / self.layout.lengths[-1]
        metrics = dict(L_mean=(weight_K * error_K).sum(), L_tail=error_K[-1])
        for n, error in zip(self.layout.patch_nums, error_K, strict=True):
            metrics[f'L_{n * self.tokenizer.stride}'] = error
        return metrics

    # ------------------------------------------------------------------------------ weights
    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform matrices, zero biases, N(0, 0.02) embeddings.

        Upstream parity: the head's own zero start of its last layer is overwritten by this, too.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
        nn.init.normal_(self.class_emb.weight, std=0.02)
        nn.init.normal_(self.encoder_pos_embed_learned, std=0.02)
        nn.init.normal_(self.decoder_pos_embed_learned, std=0.02)
        nn.init.normal_(self.diffusion_pos_embed_learned, std=0.02)

    def fit_positions(self, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
        """Learnt positions of other scales, resized; those of the rotations follow from the scales."""
        theirs = ScaleLayout(self.kwargs_from_state_dict(state)['scale'])
        if theirs.patch_nums == self.layout.patch_nums:
            return {}, ''
        fitted = {'mask': self.mask}
        for stack in ('encoder', 'decoder', 'diffusion'):
            name = f'{stack}_pos_embed_learned'
            fitted[name] = resize_positions(state[name], self.layout, theirs)
        return fitted, about_resizing(self.layout, theirs)

    def sharded_parts(self) -> list[nn.Module]:
        """The blocks of the trunk; the head is called for every scale, and its weights are gathered once."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    def training_flops(self, num_tokens: int) -> int:
        """3 (2 N L + 4 L^2 C depth + 2 M) of the trunk, and three times the forward passes of the head."""
        L = num_tokens
        blocks = [*self.encoder_blocks, *self.decoder_blocks]
        M = num_weights(*(block.ada_lin for block in blocks))  # they multiply the class alone
        N = num_weights(self) - num_weights(self.flownet) - M
        trunk = 2 * N * L + 4 * L * L * self.C * len(blocks) + 2 * M
        head = sum(self.flownet.forward_flops(l) for l in self.layout.lengths)
        return 3 * (trunk + head)

    def compile(self, **options: Any) -> None:
        """Compile the blocks of the trunk, and what the flow head evaluates."""
        compile_around_attention([*self.encoder_blocks, *self.decoder_blocks], **options)
        self.flownet.compile(**options)

    def no_weight_decay(self) -> set[str]:
        """As published: it exempts a head of another name, so the matrices of this one do decay."""
        return {'diffloss'}

    @classmethod
    def kwargs_from_size(cls, size: str, depth: int | None = None, width: int | None = None,
                         ) -> dict[str, Any]:
        """Arguments of both stacks and the kind of the head of a key of `SIZES`.

        Args:
            depth, width: in place of those of the size; another width has heads of 64 channels.
        """
        chosen = cls.SIZES[size]
        num_heads = chosen['num_heads'] if width is None else width // 64
        width = width or chosen['width']
        depth = depth or chosen['depth']
        return dict(
            encoder_embed_dim=width,
            encoder_depth=depth,
            encoder_num_heads=num_heads,
            decoder_embed_dim=width,
            decoder_depth=depth,
            decoder_num_heads=num_heads,
            cross=chosen['cross'],
        )

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        width = state['class_emb.weight'].shape[1]

        def num_blocks(prefix: str) -> int:
            numbers = [key[len(prefix):].split('.')[0] for key in state if key.startswith(prefix)]
            return 1 + max(map(int, numbers))

        def num_heads(stack: str) -> int:
            num_freqs = len(state[f'{stack}_blocks.0.attn.rope.freqs'])  # a quarter of a head's channels
            return width // 4 // num_freqs

        # The mask tells the scales: how many tokens each of them sees, its own included.
        visible = (state['mask'][0, 0] == 0).sum(1).unique().tolist()
        lengths = [end - begin for begin, end in itertools.pairwise([0, *visible])]

        # The hidden width was rounded down; a ratio of 4 is told exactly, any other to half a channel.
        hidden = len(state['encoder_blocks.0.mlp.fc1_g.bias'])
        ratio = 4. if hidden == int(width * 4. * 2 / 3.) else (hidden + 0.5) * 3 / (2 * width)
        return dict(
            num_classes=len(state['class_emb.weight']) - 1,
            encoder_embed_dim=width,
            encoder_depth=num_blocks('encoder_blocks.'),
            encoder_num_heads=num_heads('encoder'),
            decoder_embed_dim=width,
            decoder_depth=num_blocks('decoder_blocks.'),
            decoder_num_heads=num_heads('decoder'),
            mlp_ratio=ratio,
            diffloss_d=num_blocks('flownet.res_blocks.'),
            diffloss_w=len(state['flownet.input_proj.bias']),
            cross='flownet.res_blocks.0.crossattn.q.weight' in state,
            scale=tuple(math.isqrt(length) for length in lengths),
            vocab_size=None,
            channels=state['z_proj.weight'].shape[1],
        )

    def extra_repr(self) -> str:
        return f'scale={self.layout.patch_nums}, loss_weighting={self.loss_weighting}'
