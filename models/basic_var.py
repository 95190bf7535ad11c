"""What VAR and FlexVAR share: attention, feed-forward, AdaLN block and head, and a base class.

Letters: B batch, L sequence, l tokens of one scale, C width, D condition width, H heads, d head dim,
V vocabulary, 3HW image.
Source: arXiv 2404.02905, Sec. 4 and App. A.
"""
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import dist
from models.attention import KVCache, attend
from models.base import ARModel, Tokenizer
from models.editing import as_mask
from models.helpers import DropPath, Rng
from models.scales import ScaleLayout, Side, as_sizes, scale_name

MAX_LOG_SCALE = math.log(100)  # of the learnt attention scale


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

    def forward(self, x_BLC: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        B, L, C = x_BLC.shape
        # Keys have no bias, which softmax would cancel; zeros in its place allow one product for all three.
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x_BLC, self.mat_qkv.weight, bias).view(B, L, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)                                                            # (B, L, H, d)
        # Cosine attention: unit queries and keys, and a learnt temperature of every head.
        if self.attn_l2_norm:
            scale_H1 = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().view(self.num_heads, 1)
            q = (F.normalize(q, dim=-1) * scale_H1).to(v.dtype)
            k = F.normalize(k, dim=-1).to(v.dtype)
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        out = attend(q, k, v, bias=attn_bias, scale=self.scale,
                     dropout_p=self.attn_drop if self.training else 0., backend=self.backend)
        return self.proj_drop(self.proj(out.reshape(B, L, C)))

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, head_dim={self.head_dim}, attn_l2_norm={self.attn_l2_norm}'


class SharedAdaLin(nn.Sequential):
    """SiLU and Linear(D, 6C) of the condition, shared by all blocks; returns (B, 1, 6, C)."""

    def __init__(self, cond_dim: int, embed_dim: int):
        super().__init__(nn.SiLU(), nn.Linear(cond_dim, 6 * embed_dim))

    def forward(self, cond_BD: torch.Tensor) -> torch.Tensor:
        return super().forward(cond_BD).view(len(cond_BD), 1, 6, -1)


class AdaLNSelfAttn(nn.Module):
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

    def forward(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        """x (B, L, C); cond_BD (B, D), or (B, 1, 6, C) with `shared_aln`; attn_bias additive or None."""
        # Six vectors of the condition: gate, scale and shift of the attention and of the feed-forward part.
        if self.shared_aln:
            mod_B16C = self.ada_gss + cond_BD
        else:
            mod_B16C = self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = mod_B16C.unbind(2)                # (B, 1, C) each
        attn = self.attn(self.ln_wo_grad(x).mul(scale1.add(1)).add_(shift1), attn_bias=attn_bias)
        x = x + self.drop_path(attn * gamma1)
        ffn = self.ffn(self.ln_wo_grad(x).mul(scale2.add(1)).add_(shift2))
        return x + self.drop_path(ffn * gamma2)


class AdaLNBeforeHead(nn.Module):
    """LayerNorm modulated by the condition, before the output head."""

    def __init__(self, embed_dim: int, cond_dim: int, norm_eps: float = 1e-6):
        super().__init__()
        self.C = embed_dim
        self.D = cond_dim
        self.ln_wo_grad = nn.LayerNorm(embed_dim, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * embed_dim))

    def forward(self, x_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x_BLC).mul(scale.add(1)).add_(shift)


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
    if init_head >= 0:
        model.head.weight.mul_(init_head)
    model.head_nm.ada_lin[-1].weight.mul_(init_adaln)
    for block in model.blocks:
        block.attn.proj.weight.div_(math.sqrt(2 * len(model.blocks)))
        block.ffn.fc2.weight.div_(math.sqrt(2 * len(model.blocks)))
        if block.shared_aln:
            gamma = block.ada_gss[:, :, :2]
            rest = block.ada_gss[:, :, 2:]
        else:
            weight = block.ada_lin[-1].weight
            gamma = weight[:2 * block.C]
            rest = weight[2 * block.C:]
        gamma.mul_(init_adaln_gamma)
        rest.mul_(init_adaln)


class AdaLNTransformer(ARModel):
    """What VAR and FlexVAR share: class condition, blocks, head, metrics, editing.

    A subclass makes the input sequence, its positions and its mask, and draws the scales one by one.

    Args:
        tokenizer: frozen, kept as a plain reference.
        num_classes: classes; index num_classes is the null class of classifier-free guidance.
        depth, embed_dim, num_heads: of the transformer; published: depth heads, width 64 * depth.
        drop_path_rate: drop path of the last block; it grows linearly over the blocks.
        cond_drop_rate: share of labels replaced by the null class in training.
        patch_nums: sides of the code maps, coarse to fine.
        label_smooth: label smoothing of the training loss.
    """

    headline = {'Lm': 'L_mean', 'Lt': 'L_tail', 'Accm': 'acc_mean', 'Acct': 'acc_tail'}
    selection = 'L_tail'

    def __init__(self, tokenizer: Tokenizer, num_classes: int, depth: int, embed_dim: int, num_heads: int,
                 drop_path_rate: float, cond_drop_rate: float, patch_nums: Sequence[int],
                 label_smooth: float):
        super().__init__(tokenizer)
        self.Cvae = tokenizer.channels
        self.V = tokenizer.vocab_size
        self.depth = depth
        self.C = embed_dim
        self.D = embed_dim
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.cond_drop_rate = cond_drop_rate
        self.drop_path_rate = drop_path_rate
        self.label_smooth = label_smooth
        self.patch_nums = tuple(patch_nums)
        self.layout = ScaleLayout(self.patch_nums)

    def build_blocks(self, shared_aln: bool, mlp_ratio: float, drop_rate: float, attn_drop_rate: float,
                     attn_l2_norm: bool, norm_eps: float, flash_if_available: bool,
                     fused_if_available: bool) -> None:
        """Register `shared_ada_lin` and `blocks`."""
        self.shared_ada_lin = SharedAdaLin(self.D, self.C) if shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(
            AdaLNSelfAttn(self.C, self.D, shared_aln, self.num_heads, mlp_ratio, drop_rate, attn_drop_rate,
                          drop_path, attn_l2_norm, norm_eps, flash_if_available, fused_if_available)
            for drop_path in np.linspace(0, self.drop_path_rate, self.depth).tolist())

    # ------------------------------------------------------------------------------ upstream names
    L = property(lambda self: self.layout.total)
    first_l = property(lambda self: self.layout.lengths[0])
    begin_ends = property(lambda self: list(self.layout.spans))
    num_stages_minus_1 = property(lambda self: len(self.patch_nums) - 1)
    prog_si = -1
    vae_proxy = property(lambda self: (self.tokenizer,))
    vae_quant_proxy = property(lambda self: (self.tokenizer.quantize,))

    # ------------------------------------------------------------------------------ forward
    def run_blocks(self, x_BLC: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor) -> torch.Tensor:
        """(B, L, C) after all blocks; under autocast the residual stream is in low precision."""
        modulation = self.shared_ada_lin(cond_BD)
        device_type = x_BLC.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            x_BLC = x_BLC.to(dtype)
            modulation = modulation.to(dtype)
            attn_bias = attn_bias.to(dtype)
        for block in self.blocks:
            x_BLC = block(x=x_BLC, cond_BD=modulation, attn_bias=attn_bias)
        return x_BLC

    def get_logits(self, h: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        """(B, L, V) float32 of the last block's output (B, L, C) and the class embedding (B, D)."""
        return self.head(self.head_nm(h.float(), cond_BD).float()).float()

    @staticmethod
    def mark_damaged(images_B3HW: torch.Tensor, finite_B: torch.Tensor) -> torch.Tensor:
        """Nan pixels for images whose logits were not finite.

        Codes are drawn from such logits, too, and would make an image that looks like any other.
        """
        return images_B3HW.masked_fill_(~finite_B[:, None, None, None], torch.nan)

    # ------------------------------------------------------------------------------ editing
    def keep_masks(self, mask_B1HW: torch.Tensor, sizes: Sequence[tuple[int, int]],
                   keep_share: float = 0.5) -> list[torch.Tensor]:
        """Per scale, which codes of an edited image stay: (B or 1, l) bool.

        Args:
            mask_B1HW: 1 where the image is kept, in pixels or in codes of the finest scale.
            keep_share: see `edit`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def edit(self, images_B3HW: torch.Tensor, keep: torch.Tensor, labels: int | Sequence[int] | torch.Tensor,
             *, guidance: float, rng: Rng = None, paste: bool = False, keep_share: float = 0.5,
             **options: Any) -> torch.Tensor:
        """Draw again what a mask does not keep: in-painting, out-painting, class-conditional editing.

        Codes of the kept parts replace drawn ones at every scale, so that the rest is drawn to fit them. A
        mask that keeps nothing is plain sampling.

        Args:
            images_B3HW: in [-1, 1], of the size that the finest scale decodes to.
            keep: bool, True where pixels stay: (H, W) for all images, or (B, H, W); see `models.editing`.
            labels: as for `sample`; a negative int is the null class, which leaves guidance without effect.
            paste: put the kept pixels themselves over the result.
            keep_share: of the area of a code, or more, that must be kept for the code to stay.
            options: as for `sample`.
        Returns:
            (B, 3, H, W) in [0, 1].
        Raises:
            ValueError: the images or the mask have another size.
        """
        if not (images_B3HW.is_floating_point() and (images_B3HW.abs() <= 1.5).all()):  # bicubic overshoots 1
            raise ValueError('expected images in [-1, 1], got '
                             f'{images_B3HW.min().item():g}..{images_B3HW.max().item():g}: scale them')
        if 'image_size' in options:
            raise ValueError('edited images keep their size, got image_size: resize them first')
        sizes = as_sizes(options.get('infer_patch_nums', self.patch_nums))
        height, width = (side * self.tokenizer.stride for side in sizes[-1])
        if images_B3HW.shape[-2:] != (height, width):
            given = scale_name(images_B3HW.shape[-2:])
            raise ValueError('the sides of the code maps must end at the image size: they end at '
                             f'{height}x{width} pixels, got images of {given}: '
                             'resize the images, or pass other sides where the model takes them')
        mask_B1HW = as_mask(keep, images_B3HW)
        idx_kBl = self.tokenizer.encode(images_B3HW, sizes)
        kept = list(zip(idx_kBl, self.keep_masks(mask_B1HW, sizes, keep_share), strict=True))
        labels_B = self.as_labels(labels, len(images_B3HW), rng)
        edited = self.sample(labels_B, guidance=guidance, rng=rng, keep=kept, **options)
        return torch.where(mask_B1HW > 0.5, images_B3HW.add(1).mul(0.5), edited) if paste else edited

    # ------------------------------------------------------------------------------ metrics
    def scale_metrics(self, logits_BLV: torch.Tensor, target_BL: torch.Tensor,
                      patch_nums: Sequence[Side]) -> dict[str, torch.Tensor]:
        """Cross-entropy without smoothing and top-1 accuracy in percent, mean, tail, and per scale.

        Tail is the last scale. Scales are named by their side in pixels. In training also the share of the
        vocabulary in use.
        """
        layout = ScaleLayout(tuple(patch_nums))
        loss_L = F.cross_entropy(logits_BLV.transpose(1, 2), target_BL, reduction='none').mean(0)
        predicted_BL = logits_BLV.argmax(-1)
        acc_L = (predicted_BL == target_BL).float().mean(0).mul(100)
        out = dict(L_mean=loss_L.mean(), acc_mean=acc_L.mean())
        for (begin, end), (height, _) in zip(layout.spans, layout.sizes, strict=True):
            side = height * self.tokenizer.stride
            out[f'L_{side}'] = loss_L[begin:end].mean()
            out[f'acc_{side}'] = acc_L[begin:end].mean()
        out |= dict(L_tail=out[f'L_{side}'], acc_tail=out[f'acc_{side}'])
        if self.training:
            hit_V = torch.bincount(predicted_BL.flatten(), minlength=self.V).float()
            dist.allreduce(hit_V)
            out['z_voc_usage'] = (hit_V / hit_V.sum() > 0.001 / self.V).float().mean() * 100
        return out

    # ------------------------------------------------------------------------------ weights
    def init_weights(self, init_adaln: float = 0.5, init_adaln_gamma: float = 1e-5, init_head: float = 0.02,
                     init_std: float = 0.02, conv_std_or_gain: float = 0.02) -> None:
        """See `init_transformer`; pos_start and pos_1LC stay as constructed. The model has no convolution."""
        init_transformer(self, init_adaln, init_adaln_gamma, init_head, init_std)

    @staticmethod
    def published_sizes(depth: int) -> dict[str, Any]:
        """Constructor arguments that follow from the depth in every published model."""
        return dict(depth=depth, embed_dim=64 * depth, num_heads=depth, drop_path_rate=0.1 * depth / 24)

    def no_weight_decay(self) -> set[str]:
        return {'cls_token', 'start_token', 'task_token', 'cfg_uncond', 'pos_embed', 'pos_1LC', 'pos_start',
                'start_pos', 'lvl_embed', 'gamma', 'beta', 'ada_gss', 'moe_bias', 'scale_mul'}

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Everything but the sides of the code maps."""
        width = state['pos_start'].shape[-1]
        head = 'blocks.0.attn.scale_mul_1H11'
        q_bias = state['blocks.0.attn.q_bias']
        depth = 1 + max(int(key.split('.')[1]) for key in state if key.startswith('blocks.'))
        return dict(num_classes=len(state['class_emb.weight']) - 1, depth=depth, embed_dim=width,
                    num_heads=state[head].shape[1] if head in state else len(q_bias) // 64,
                    mlp_ratio=len(state['blocks.0.ffn.fc1.bias']) / width,
                    shared_aln='shared_ada_lin.1.weight' in state, attn_l2_norm=head in state,
                    vocab_size=len(state['head.bias']), channels=state['word_embed.weight'].shape[1])

    def extra_repr(self) -> str:
        return f'patch_nums={self.patch_nums}, drop_path_rate={self.drop_path_rate:g}'
