"""Parts that VAR and FlexVAR share: attention, feed-forward network, AdaLN block and head, initialisation.

Letters: B batch, L sequence, C width, D condition width, H heads, d head dim.
Source: arXiv 2404.02905, Sec. 4 and App. A.
"""
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models.attention import KVCache, Mask, attend
from models.base import num_weights
from models.helpers import DropPath, weighted
from models.recompute import Recomputable
from models.scales import BlockCausal

MAX_LOG_SCALE = math.log(100)  # of the learnt attention scale

# gamma (B, 1, C), and the weights of `DropPath`
Gate = tuple[torch.Tensor, torch.Tensor | None]


class FFN(nn.Module):
    """Linear, GELU (tanh form), Linear. `fused_if_available` is for compatibility only: there is one path."""

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.,
                 fused_if_available: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(F.gelu(self.fc1(x), approximate='tanh')))


class SelfAttention(nn.Module):
    """Multi-head attention; with `attn_l2_norm` over unit queries and keys and a learnt scale per head.

    `cache` is the slot that `kv_caching` fills while sampling.
    """

    def __init__(self, embed_dim: int, num_heads: int, attn_drop: float = 0., proj_drop: float = 0.,
                 attn_l2_norm: bool = False, flash_if_available: bool = True):
        super().__init__()
        assert embed_dim % num_heads == 0, f'{embed_dim=} must be a multiple of {num_heads=}'
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.attn_l2_norm = attn_l2_norm
        self.attn_drop = attn_drop
        self.backend = 'auto' if flash_if_available else 'sdpa'
        if attn_l2_norm:
            self.scale = 1.
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), 4.).log())
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)  # the 0.25 is part of the published model
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dim))
        self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer('zero_k_bias', torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.cache: KVCache | None = None

    def kv_caching(self, enable: bool) -> None:
        """Switch caching on or off, forgetting what is cached."""
        self.cache = KVCache() if enable else None

    def forward(self, x_BLC: torch.Tensor, attn_bias: Mask) -> torch.Tensor:
        """(B, L, C); attn_bias: see `attend`."""
        return self.project(self.attend(*self.queries_keys_values(x_BLC), attn_bias))

    def queries_keys_values(self, x_BLC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of all tokens, (B, L, H, d) each."""
        B, L, _ = x_BLC.shape
        # Keys have no bias, as published; zeros in its place allow one product for all three.
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x_BLC, self.mat_qkv.weight, bias).view(B, L, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)                                                            # (B, L, H, d)
        # Cosine attention: unit queries and keys, and a learnt temperature of every head.
        if self.attn_l2_norm:
            scale_H1 = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().view(self.num_heads, 1)
            q = (F.normalize(q, dim=-1) * scale_H1).to(v.dtype)
            k = F.normalize(k, dim=-1).to(v.dtype)
        return q, k, v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: Mask) -> torch.Tensor:
        """(B, L, H, d): what each head sees."""
        # While sampling, the queries of a scale also see the keys of all scales before it.
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        dropout_p = self.attn_drop if self.training else 0.
        return attend(q, k, v, bias=attn_bias, scale=self.scale, dropout_p=dropout_p, backend=self.backend)

    def project(self, out_BLHd: torch.Tensor) -> torch.Tensor:
        """(B, L, C): what all heads see, mixed."""
        return self.proj_drop(self.proj(out_BLHd.flatten(2)))

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, head_dim={self.head_dim}, attn_l2_norm={self.attn_l2_norm}'


class SharedAdaLin(nn.Sequential):
    """SiLU and Linear(D, 6C) of the condition, shared by all blocks; returns (B, 1, 6, C)."""

    def __init__(self, cond_dim: int, embed_dim: int):
        super().__init__(nn.SiLU(), nn.Linear(cond_dim, 6 * embed_dim))

    def forward(self, cond_BD: torch.Tensor) -> torch.Tensor:
        return super().forward(cond_BD).view(len(cond_BD), 1, 6, -1)


class AdaLNSelfAttn(Recomputable):
    """Attention and feed-forward, each normalised, modulated by the condition and gated.

    Args:
        shared_aln: the condition comes as (B, 1, 6, C) from `SharedAdaLin` and the block only adds an offset.
    """

    def __init__(
        self,
        embed_dim: int,
        cond_dim: int,
        shared_aln: bool,
        num_heads: int,
        mlp_ratio: float = 4.,
        drop: float = 0.,
        attn_drop: float = 0.,
        drop_path: float = 0.,
        attn_l2_norm: bool = False,
        norm_eps: float = 1e-6,
        flash_if_available: bool = True,
        fused_if_available: bool = True,
    ):
        super().__init__()
        self.C = embed_dim
        self.D = cond_dim
        self.shared_aln = shared_aln
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, embed_dim) / embed_dim ** 0.5)
        self.drop_path = DropPath(drop_path)
        self.attn = SelfAttention(embed_dim, num_heads, attn_drop, drop, attn_l2_norm, flash_if_available)
        self.ffn = FFN(embed_dim, round(embed_dim * mlp_ratio), drop, fused_if_available)
        self.ln_wo_grad = nn.LayerNorm(embed_dim, eps=norm_eps, elementwise_affine=False)
        if not shared_aln:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 6 * embed_dim))

    def modulation(self, cond_BD: torch.Tensor) -> torch.Tensor:
        """(B, 1, 6, C) of the condition: two gates, two scales and two shifts."""
        if self.shared_aln:
            return self.ada_gss + cond_BD
        return self.ada_lin(cond_BD).view(-1, 1, 6, self.C)

    def forward(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: Mask) -> torch.Tensor:
        """x (B, L, C); cond_BD (B, D), or (B, 1, 6, C) with `shared_aln`; attn_bias: see `attend`."""
        return self.recomputed('block', self.conditioned, x, cond_BD, attn_bias)           # (B, L, C)

    def conditioned(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: Mask) -> torch.Tensor:
        """What `forward` computes, and computes again in the backward pass where that is asked for."""
        return self.modulated(x, self.modulation(cond_BD), attn_bias)

    def modulated(self, x: torch.Tensor, mod_B16C: torch.Tensor, attn_bias: Mask = None) -> torch.Tensor:
        """`forward`, given the `modulation` of the condition, which sampling makes once for all scales."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = mod_B16C.unbind(2)                # (B, 1, C) each
        # Which images skip a branch is drawn here: the two parts below are compiled, and one graph serves
        # all blocks, whose rates differ.
        kept_attn_B11 = self.drop_path.weights(x)
        kept_ffn_B11 = self.drop_path.weights(x)
        out_BLHd = self.recomputed('attention', self.attended, x, scale1, shift1, attn_bias)
        return self.after_attention(x, out_BLHd, (gamma1, kept_attn_B11), (scale2, shift2),
                                    (gamma2, kept_ffn_B11))                                # (B, L, C)

    def attended(self, x: torch.Tensor, scale_B1C: torch.Tensor, shift_B1C: torch.Tensor,
                 attn_bias: Mask) -> torch.Tensor:
        """(B, L, H, d): what each head sees, given the tokens as they enter the block."""
        # Between the two the cache grows, or a call follows for every scale, so they are compiled apart.
        q, k, v = self.before_attention(x, scale_B1C, shift_B1C)
        return self.attn.attend(q, k, v, attn_bias)

    def before_attention(self, x: torch.Tensor, scale_B1C: torch.Tensor, shift_B1C: torch.Tensor,
                         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, (B, L, H, d) each, of the normalised and modulated tokens."""
        h_BLC = self.ln_wo_grad(x).mul(scale_B1C.add(1)).add_(shift_B1C)                   # (B, L, C)
        return self.attn.queries_keys_values(h_BLC)

    def after_attention(self, x: torch.Tensor, out_BLHd: torch.Tensor, attn_gate: Gate,
                        ffn_modulation: tuple[torch.Tensor, torch.Tensor], ffn_gate: Gate) -> torch.Tensor:
        """The tokens with both branches added, each gated, and dropped for some images in training.

        Args:
            ffn_modulation: scale and shift of the feed-forward network, (B, 1, C) each.
        """
        x = x + gated(self.attn.project(out_BLHd), attn_gate)
        scale_B1C, shift_B1C = ffn_modulation
        h_BLC = self.ln_wo_grad(x).mul(scale_B1C.add(1)).add_(shift_B1C)                   # (B, L, C)
        return x + gated(self.ffn(h_BLC), ffn_gate)                                        # (B, L, C)


def gated(branch_BLC: torch.Tensor, gate: Gate) -> torch.Tensor:
    """A branch as it is added to the tokens."""
    gamma_B1C, kept_B11 = gate
    return weighted(branch_BLC * gamma_B1C, kept_B11)


class AdaLNBeforeHead(nn.Module):
    """LayerNorm modulated by the condition, before the output head."""

    def __init__(self, embed_dim: int, cond_dim: int, norm_eps: float = 1e-6):
        super().__init__()
        self.C = embed_dim
        self.D = cond_dim
        self.ln_wo_grad = nn.LayerNorm(embed_dim, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * embed_dim))

    def modulation(self, cond_BD: torch.Tensor) -> torch.Tensor:
        """(B, 1, 2, C) of the condition: scale and shift."""
        return self.ada_lin(cond_BD).view(-1, 1, 2, self.C)

    def forward(self, x_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        return self.modulated(x_BLC, self.modulation(cond_BD))

    def modulated(self, x_BLC: torch.Tensor, mod_B12C: torch.Tensor) -> torch.Tensor:
        """`forward`, given the `modulation` of the condition."""
        scale, shift = mod_B12C.unbind(2)                                                  # (B, 1, C) each
        return self.ln_wo_grad(x_BLC).mul(scale.add(1)).add_(shift)


# ---------------------------------------------------------------------------------------------- the stack
def build_blocks(depth: int, drop_path_rate: float, **kwargs: Any) -> nn.ModuleList:
    """`depth` blocks, whose drop path grows linearly from 0 at the first one to `drop_path_rate` at the last.

    Args:
        kwargs: all other arguments of `AdaLNSelfAttn`.
    """
    rates = np.linspace(0, drop_path_rate, depth).tolist()
    return nn.ModuleList(AdaLNSelfAttn(drop_path=rate, **kwargs) for rate in rates)


def run_blocks(blocks: nn.ModuleList, x_BLC: torch.Tensor, modulation: torch.Tensor,
               attn_bias: BlockCausal) -> torch.Tensor:
    """(B, L, C) after all blocks; under autocast the residual stream is in low precision, as published."""
    device_type = x_BLC.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x_BLC = x_BLC.to(dtype)
        modulation = modulation.to(dtype)
        attn_bias = attn_bias.to(dtype)
    for block in blocks:
        x_BLC = block(x=x_BLC, cond_BD=modulation, attn_bias=attn_bias)
    return x_BLC


def num_class_weights(model: nn.Module) -> int:
    """Entries of the matrices that multiply the class of an image alone, and none of its tokens."""
    of_blocks = [block.ada_lin for block in model.blocks if not block.shared_aln]
    return num_weights(model.shared_ada_lin, model.head_nm, *of_blocks)


def transformer_flops(model: nn.Module, L: int) -> int:
    """3 (2 N L + 4 L^2 C depth + 2 M): FLOPs of the products of a training image.

    N weights multiply each of L tokens; M weights multiply the class of the image alone.
    """
    M = num_class_weights(model)
    N = num_weights(model) - M
    attention = 4 * L * L * model.C * len(model.blocks)
    return 3 * (2 * N * L + attention + 2 * M)


class PublishedNames:
    """Attributes under which the published code knows parts of VAR and FlexVAR."""

    L = property(lambda self: self.layout.total)
    first_l = property(lambda self: self.layout.lengths[0])
    begin_ends = property(lambda self: list(self.layout.spans))
    num_stages_minus_1 = property(lambda self: len(self.patch_nums) - 1)
    prog_si = -1
    vae_proxy = property(lambda self: (self.tokenizer,))
    vae_quant_proxy = property(lambda self: (self.tokenizer.quantize,))


# ---------------------------------------------------------------------------------------------- weights
@torch.no_grad()
def init_transformer(model: nn.Module, init_adaln: float, init_adaln_gamma: float, init_head: float,
                     init_std: float) -> None:
    """Initialisation rules shared by VAR and FlexVAR, for a model with blocks, head and head_nm.

    Args:
        init_adaln, init_adaln_gamma: multipliers of the AdaLN weights: scales and shifts, and the two gammas.
        init_head: multiplier of the head's weight; negative leaves it.
        init_std: of every Linear and Embedding; negative means sqrt(1 / (3 C)).
    """
    std = (1 / model.C / 3) ** 0.5 if init_std < 0 else init_std
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()

    # A small head makes all codes nearly equally likely at first.
    if init_head >= 0:
        model.head.weight.mul_(init_head)
    model.head_nm.ada_lin[-1].weight.mul_(init_adaln)

    # Each block adds two branches to the residual stream, whose variance is to stay the same at any depth.
    num_branches = 2 * len(model.blocks)
    for block in model.blocks:
        block.attn.proj.weight.div_(math.sqrt(num_branches))
        block.ffn.fc2.weight.div_(math.sqrt(num_branches))
        # Gates begin near zero, so that a block begins near the identity.
        if block.shared_aln:
            gamma = block.ada_gss[:, :, :2]
            rest = block.ada_gss[:, :, 2:]
        else:
            weight = block.ada_lin[-1].weight
            gamma = weight[:2 * block.C]
            rest = weight[2 * block.C:]
        gamma.mul_(init_adaln_gamma)
        rest.mul_(init_adaln)


# parts of VAR and FlexVAR by name, see `ARModel.parts`
PARTS = dict(
    class_emb=('class_emb.*',),
    pos=('pos_start', 'pos_1LC', 'lvl_embed.*'),
    trunk=('blocks.*', 'shared_ada_lin.*', 'head_nm.*'),
    head=('head.*',),
)

# parameters without weight decay, by parts of their names, as published
NO_WEIGHT_DECAY = frozenset({
    'cls_token', 'start_token', 'task_token', 'cfg_uncond', 'pos_embed', 'pos_1LC', 'pos_start', 'start_pos',
    'lvl_embed', 'gamma', 'beta', 'ada_gss', 'moe_bias', 'scale_mul'})


def kwargs_from_depth(depth: int, width: int = 0) -> dict[str, Any]:
    """Sizes that follow from the depth, as in every published VAR and FlexVAR.

    Args:
        width: another one than the published 64 * depth; as many heads share it. 0 takes the published one.
    """
    return dict(depth=depth, embed_dim=width or 64 * depth, num_heads=depth)


def published_sizes(depth: int) -> dict[str, Any]:
    """As `kwargs_from_depth`, with the drop path of the published trainings."""
    return dict(**kwargs_from_depth(depth), drop_path_rate=0.1 * depth / 24)


def transformer_kwargs(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a state dict of VAR or FlexVAR reveals of model and codes: all but the sides of the maps."""
    depth = 1 + max(int(key.split('.')[1]) for key in state if key.startswith('blocks.'))
    width = state['pos_start'].shape[-1]

    # With unit queries and keys there is a scale per head; without, published heads are 64 channels wide.
    scale_key = 'blocks.0.attn.scale_mul_1H11'
    attn_l2_norm = scale_key in state
    num_heads = state[scale_key].shape[1] if attn_l2_norm else max(width // 64, 1)
    return dict(
        num_classes=len(state['class_emb.weight']) - 1,
        depth=depth,
        embed_dim=width,
        num_heads=num_heads,
        mlp_ratio=len(state['blocks.0.ffn.fc1.bias']) / width,
        shared_aln='shared_ada_lin.1.weight' in state,
        attn_l2_norm=attn_l2_norm,
        vocab_size=len(state['head.bias']),
        channels=state['word_embed.weight'].shape[1],
    )
