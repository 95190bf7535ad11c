"""VAR: a transformer that predicts the next scale of a token pyramid.

Letters: B batch, K scales, L all tokens, l tokens of one scale, C width, D condition width, Z tokenizer
channels, V vocabulary, 3HW image. Source: arXiv 2404.02905.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn import functional as F

from models.base import Tokenizer
from models.basic_var import AdaLNBeforeHead, AdaLNSelfAttn, AdaLNTransformer, SharedAdaLin
from models.editing import Keep, keep_of_scale, mostly_kept
from models.helpers import Rng, drop_labels, guide, gumbel_softmax_with_rng, sample_with_top_k_top_p_
from models.sampling import sampling_mode
from models.tokenizers.vqvae import VQVAE

__all__ = ['VAR', 'VARHF', 'AdaLNSelfAttn', 'ProgressiveSchedule', 'ScaleStep', 'SharedAdaLin',
           'gumbel_softmax_with_rng', 'sample_with_top_k_top_p_']


@dataclass(frozen=True)
class ProgressiveSchedule:
    """Progressive training: coarse scales first, finer ones added one by one. All counts are micro-steps.

    Args:
        num_scales: K. total: micro-steps of the whole training.
        warmup: lr warm-up, during which the stage is the first.
        until: share of the training after which all scales take part, in (0, 1].
        first_stage: scale index of the first stage.
        stage_warmup: micro-steps over which the newest scale's loss weight grows to 1.
    """

    num_scales: int
    total: int
    warmup: float
    until: float
    first_stage: int = 4
    stage_warmup: float = 0.

    def stage(self, step: np.ndarray) -> np.ndarray:
        """Index of the finest scale trained at each step."""
        last = self.num_scales - 1
        full_from = self.total * self.until
        done = np.clip((step - self.warmup) / max(full_from - self.warmup, 1e-9), 0, 1)
        stage = self.first_stage + np.round(done * (last - self.first_stage)).astype(int)
        return np.where(step <= self.warmup, self.first_stage, np.where(step >= full_from, last, stage))

    @cached_property
    def stage_begins(self) -> dict[int, int]:
        """First step of every stage that occurs."""
        stages, first = np.unique(self.stage(np.arange(self.total)), return_index=True)
        return dict(zip(stages.tolist(), first.tolist(), strict=True))

    def at(self, progress: float) -> tuple[int, float]:
        """(stage, loss weight of its newest scale) after the given share of the training."""
        step = min(round(progress * self.total), self.total - 1)
        stage = int(self.stage(np.array(step)))
        if self.stage_begins[stage] == 0 or stage == self.num_scales - 1 or not self.stage_warmup:
            return stage, 1.
        steps_in_stage = step - self.stage_begins[stage] + 1
        return stage, min(max(steps_in_stage / self.stage_warmup, 0.01), 1.)


class ScaleStep(NamedTuple):
    """What sampling one scale produced."""
    k: int
    logits_BlV: torch.Tensor  # guided, before filtering
    idx_Bl: torch.Tensor      # drawn or kept codes, int64
    f_hat: torch.Tensor       # sum so far, (B, Z, P, P), P = patch_nums[-1]; the next adds to it in place


class VAR(AdaLNTransformer):
    """Next-scale transformer with AdaLN conditioning.

    Args:
        vae_local: frozen tokenizer, kept as a plain reference.
        num_classes: classes; index num_classes is the null class of classifier-free guidance.
        depth, embed_dim, num_heads, mlp_ratio: of the transformer; published: depth heads, width 64 * depth.
        drop_rate, attn_drop_rate, drop_path_rate: dropout; drop path grows linearly over the blocks.
        norm_eps: of every LayerNorm.
        shared_aln: one AdaLN projection for all blocks.
        cond_drop_rate: share of labels replaced by the null class in training.
        attn_l2_norm: unit queries and keys with a learnt scale; published weights use it.
        patch_nums: sides of the code maps, coarse to fine.
        flash_if_available: False means torch's SDPA always. fused_if_available: accepted for compatibility.
        label_smooth: label smoothing of the training loss.
        progressive: arguments of `ProgressiveSchedule` beside num_scales, or None for all scales at once.
    """

    def __init__(
        self,
        vae_local: Tokenizer,
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.,
        drop_rate: float = 0.,
        attn_drop_rate: float = 0.,
        drop_path_rate: float = 0.,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = False,
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        flash_if_available: bool = True,
        fused_if_available: bool = True,
        label_smooth: float = 0.,
        progressive: dict[str, float] | None = None,
    ):
        # 0. hyper-parameters
        super().__init__(vae_local, num_classes, depth, embed_dim, num_heads, drop_path_rate, cond_drop_rate,
                         patch_nums, label_smooth)
        self.progressive = ProgressiveSchedule(len(self.patch_nums), **progressive) if progressive else None
        std = math.sqrt(1 / self.C / 3)

        # 1. input: code embedding
        self.word_embed = nn.Linear(self.Cvae, self.C)

        # 2. class embedding, with the null class as its last row
        self.class_emb = nn.Embedding(num_classes + 1, self.C)
        nn.init.trunc_normal_(self.class_emb.weight, std=std)
        self.pos_start = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.first_l, self.C), std=std))

        # 3. absolute position of every token, and the scale it belongs to
        self.pos_1LC = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.L, self.C), std=std))
        self.lvl_embed = nn.Embedding(len(self.patch_nums), self.C)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=std)

        # 4. transformer
        self.build_blocks(shared_aln, mlp_ratio, drop_rate, attn_drop_rate, attn_l2_norm, norm_eps,
                          flash_if_available, fused_if_available)

        # 5. level of each token, and the block-causal mask of training
        self.register_buffer('lvl_1L', self.layout.level_L()[None])
        self.register_buffer('attn_bias_for_masking', self.layout.causal_bias()[None, None])

        # 6. head
        self.head_nm = AdaLNBeforeHead(self.C, self.D, norm_eps)
        self.head = nn.Linear(self.C, self.V)

    # ------------------------------------------------------------------------------ training
    def training_loss(self, images_B3HW: torch.Tensor, label_B: torch.Tensor,
                      progress: float = 1.) -> tuple[torch.Tensor, dict[str, Any]]:
        """Cross-entropy of all tokens given the coarser scales (Eq. 6), each token weighted 1 / L."""
        # Progressive training leaves out the finest scales at first, and fades in the newest one.
        stage = len(self.patch_nums) - 1
        newest_weight = 1.
        if self.progressive:
            stage, newest_weight = self.progressive.at(progress)

        # The target is the whole pyramid of codes, flattened from coarse to fine. Teacher forcing: a scale
        # sees the sum of the true coarser ones, resized to its own side.
        idx_kBl = self.tokenizer.encode(images_B3HW)[:stage + 1]
        target_BL = torch.cat(idx_kBl, dim=1)
        with torch.autocast(images_B3HW.device.type, enabled=False):
            teacher_BLZ = self.tokenizer.quantize.idxBl_to_var_input(idx_kBl)
        logits_BLV = self(label_B, teacher_BLZ)

        # Weights stay 1 / L of the whole pyramid, also where some scales are left out, as published.
        weight_L = torch.full((target_BL.shape[1],), 1 / self.L, device=target_BL.device)
        weight_L[self.layout.spans[stage][0]:] *= newest_weight
        loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), target_BL, label_smoothing=self.label_smooth,
                                  reduction='none')
        aux = dict(logits_BLV=logits_BLV.detach(), target_BL=target_BL, stage=stage,
                   newest_weight=newest_weight)
        return (loss_BL * weight_L).sum(1).mean(), aux

    def forward(self, label_B: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor | None) -> torch.Tensor:
        """Teacher-forced logits; labels are dropped in training mode only.

        Args:
            label_B: (B,) int64 in [0, num_classes].
            x_BLCv_wo_first_l: `idxBl_to_var_input` of the codes, (B, tokens after the first scale, Z); its
                length says how many scales take part. None for the first scale alone.
        Returns:
            (B, first_l + tokens, V) float32.
        """
        B = len(label_B)
        num_given = 0 if x_BLCv_wo_first_l is None else x_BLCv_wo_first_l.shape[1]
        L = self.first_l + num_given
        self.layout.num_scales_of(L)  # refuses a length that ends within a scale

        # Embeddings are in float32 under any autocast, as published.
        with torch.autocast(label_B.device.type, enabled=False):
            if self.training:
                label_B = drop_labels(label_B, self.num_classes, self.cond_drop_rate)
            cond_BD = self.class_emb(label_B)                                              # (B, D), D = C
            # The first scale has nothing to see but the class, which is its start token.
            x_BLC = cond_BD[:, None].expand(B, self.first_l, -1) + self.pos_start          # (B, 1, C)
            if x_BLCv_wo_first_l is not None:
                given_BLC = self.word_embed(x_BLCv_wo_first_l.float())
                x_BLC = torch.cat([x_BLC, given_BLC], dim=1)                               # (B, L, C)
            x_BLC = x_BLC + self.lvl_embed(self.lvl_1L[:, :L]) + self.pos_1LC[:, :L]

        # A token sees its own scale and all coarser ones.
        attn_bias = self.attn_bias_for_masking[:, :, :L, :L]                               # (1, 1, L, L)
        x_BLC = self.run_blocks(x_BLC, cond_BD, attn_bias)
        return self.get_logits(x_BLC, cond_BD)                                             # (B, L, V)

    # ------------------------------------------------------------------------------ sampling
    @torch.no_grad()
    def sample_scales(self, label_B: torch.Tensor, *, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.,
                      more_smooth: bool = False, rng: Rng = None,
                      keep: Keep | None = None) -> Iterator[ScaleStep]:
        """Algorithm of sampling, one step per scale; in eval mode whatever the model's mode is.

        Until it is exhausted or closed, the model keeps a cache and serves nothing else.

        Args:
            label_B: (B,) int64, see `as_labels`.
            cfg: guidance at the last scale; it grows linearly from 0 at the first.
            top_k, top_p: see `filter_top_k_top_p_`; 0 is off.
            more_smooth: mix code embeddings by Gumbel softmax: smoother pictures, worse scores.
            rng: a generator, `ImageNoise`, or None for torch's global generator.
            keep: codes that replace drawn ones; they consume the same noise.
        """
        B = len(label_B)
        quantize = self.tokenizer.quantize

        # The first half of the batch has its classes, the second one the null class, for guidance.
        null_B = torch.full_like(label_B, self.num_classes)
        cond_BD = self.class_emb(torch.cat([label_B, null_B]))                             # (2B, D)
        modulation = self.shared_ada_lin(cond_BD)
        position_1LC = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        next_BlC = (cond_BD[:, None].expand(2 * B, self.first_l, -1) + self.pos_start
                    + position_1LC[:, :self.first_l])
        f_hat = cond_BD.new_zeros(B, self.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        with sampling_mode(self, self.blocks, capacity=self.L):
            for k, pn in enumerate(self.patch_nums):
                # 1. All tokens of the scale in one pass. There is no mask: the cache holds the coarser
                #    scales alone, and all of them may be seen.
                x_BlC = next_BlC                                                           # (2B, pn^2, C)
                for block in self.blocks:
                    x_BlC = block(x=x_BlC, cond_BD=modulation, attn_bias=None)

                # 2. Guidance, which grows from 0 at the first scale to cfg at the last one.
                cond_BlV, uncond_BlV = self.get_logits(x_BlC, cond_BD).chunk(2)
                ratio = self.layout.ratio(k)
                logits_BlV = guide(cond_BlV, uncond_BlV, 1 + cfg * ratio)                  # (B, pn^2, V)

                # 3. Codes: drawn, or given by an edit; then their embeddings.
                filtered_BlV = logits_BlV.clone()  # in place, by the draw
                drawn_Bl = sample_with_top_k_top_p_(filtered_BlV, top_k, top_p, rng)[:, :, 0]
                idx_Bl, given_Bl = keep_of_scale(keep, k, drawn_Bl)
                h_BlZ = quantize.lookup(idx_Bl, k)
                if more_smooth:
                    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
                    mix_BlV = gumbel_softmax_with_rng(filtered_BlV.mul(1 + ratio), tau=tau, rng=rng)
                    smooth_BlZ = mix_BlV @ quantize.embedding.weight[quantize.rows(k)]
                    h_BlZ = torch.where(given_Bl[..., None], h_BlZ, smooth_BlZ)

                # 4. The scale is added to the sum of all scales so far (Algorithm 2 of the paper).
                h_BZpp = h_BlZ.transpose(1, 2).reshape(B, self.Cvae, pn, pn)
                f_hat, next_BZpp = quantize.get_next_autoregressive_input(
                    k, len(self.patch_nums), f_hat, h_BZpp)
                yield ScaleStep(k, logits_BlV, idx_Bl, f_hat)

                # 5. That sum, resized to the next side, is what the next scale sees.
                if k < len(self.patch_nums) - 1:
                    begin, end = self.layout.spans[k + 1]
                    next_BlC = self.word_embed(next_BZpp.flatten(2).transpose(1, 2))
                    next_BlC = (next_BlC + position_1LC[:, begin:end]).repeat(2, 1, 1)

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B: int, label_B: int | Sequence[int] | torch.Tensor | None,
                                 g_seed: int | None = None, cfg: float = 1.5, top_k: int = 0,
                                 top_p: float = 0., more_smooth: bool = False) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1], the published call.

        Args:
            label_B: see `as_labels`.
            g_seed: seeds the model's own generator, so a batch repeats; None draws from torch's global one.
            cfg, top_k, top_p, more_smooth: see `sample_scales`.
        """
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        return self._images(self.as_labels(label_B, B, rng), cfg=cfg, top_k=top_k, top_p=top_p,
                            more_smooth=more_smooth, rng=rng)

    def sample(self, labels: torch.Tensor | Sequence[int], *, guidance: float = 2.5, rng: Rng = None,
               **options: Any) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1]; guidance is the published cfg + 1; options: see `sample_scales`."""
        return self._images(self.as_labels(labels, len(labels), rng), cfg=guidance - 1, rng=rng, **options)

    @torch.no_grad()
    def _images(self, label_B: torch.Tensor, **options: Any) -> torch.Tensor:
        finite_B = torch.ones_like(label_B, dtype=torch.bool)
        for step in self.sample_scales(label_B, **options):
            f_hat = step.f_hat
            finite_B &= step.logits_BlV.isfinite().flatten(1).all(1)
        return self.mark_damaged(self.tokenizer.fhat_to_img(f_hat).add_(1).mul_(0.5), finite_B)

    def keep_masks(self, mask_B1HW: torch.Tensor, sizes: Sequence[tuple[int, int]],
                   keep_share: float = 0.5) -> list[torch.Tensor]:
        """As published: the finest scale by area, others from it; maps of up to 3 stay if anything does."""
        finest_B1hw = mostly_kept(mask_B1HW, sizes[-1], keep_share).view(-1, 1, *sizes[-1]).float()
        return [finest_B1hw.amax((2, 3)) > 0 if height * width <= 3 else
                (F.interpolate(finest_B1hw, size=(height, width), mode='bilinear') > 0.5).flatten(1)
                for height, width in sizes]

    # ------------------------------------------------------------------------------ metrics
    @torch.no_grad()
    def metrics(self, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `scale_metrics`; tails are -1 before the last progressive stage, which training adds."""
        stage = aux['stage']
        out = self.scale_metrics(aux['logits_BLV'], aux['target_BL'], self.patch_nums[:stage + 1])
        if stage < len(self.patch_nums) - 1:
            out |= {name: torch.full_like(out['L_mean'], -1) for name in ('L_tail', 'acc_tail')}
        if self.training:
            side = self.patch_nums[stage] * self.tokenizer.stride
            for name, value in (('prog_si', stage if self.progressive else -1),
                                ('prog_wp', aux['newest_weight']), ('prog_a_reso', side)):
                out[name] = torch.full_like(out['L_mean'], value)
        return out

    def config_state(self, progress: float) -> dict[str, Any]:
        """The published `trainer.config`; resume needs none of it, since the stage follows from the step."""
        resos = [pn * self.tokenizer.stride for pn in self.patch_nums]
        config = dict(patch_nums=list(self.patch_nums), resos=resos, label_smooth=self.label_smooth,
                      prog_it=0, last_prog_si=-1, first_prog=True)
        if self.progressive:
            schedule = self.progressive
            stage, _ = self.progressive.at(progress)
            begin = schedule.stage_begins[stage]
            config.update(prog_it=round(progress * schedule.total) - begin, last_prog_si=stage,
                          first_prog=begin == 0)
        return config

    # ------------------------------------------------------------------------------ weights
    @staticmethod
    def tokenizer_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(v_patch_nums=kwargs['patch_nums'])

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        lengths = state['lvl_1L'].flatten().bincount().tolist()
        return AdaLNTransformer.kwargs_from_state_dict(state) | dict(
            patch_nums=tuple(math.isqrt(length) for length in lengths))


class VARHF(VAR, PyTorchModelHubMixin):
    """VAR with `from_pretrained`, `save_pretrained` and `push_to_hub` (safetensors).

    Args:
        vae_kwargs: arguments of the VQVAE it builds; the tokenizer's weights are loaded separately.
    """

    def __init__(
        self,
        vae_kwargs: dict[str, Any],
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.,
        drop_rate: float = 0.,
        attn_drop_rate: float = 0.,
        drop_path_rate: float = 0.,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = False,
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        flash_if_available: bool = True,
        fused_if_available: bool = True,
    ):
        super().__init__(VQVAE(**vae_kwargs), num_classes, depth, embed_dim, num_heads, mlp_ratio, drop_rate,
                         attn_drop_rate, drop_path_rate, norm_eps, shared_aln, cond_drop_rate, attn_l2_norm,
                         patch_nums, flash_if_available, fused_if_available)
