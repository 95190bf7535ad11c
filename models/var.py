"""VAR: a transformer that predicts the next scale of a token pyramid.

Letters: B batch, K scales and k one of them, L all tokens, l tokens of one scale, p side of its code map, P
side of the last one, C width, D condition width, Z tokenizer channels, V vocabulary, 3HW image.
Source: arXiv 2404.02905.
"""
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn import functional as F

from models.attention import compile_around_attention
from models.base import ARModel, Tokenizer
from models.basic_var import (
    NO_WEIGHT_DECAY,
    PARTS,
    AdaLNBeforeHead,
    AdaLNSelfAttn,
    PublishedNames,
    SharedAdaLin,
    build_blocks,
    init_transformer,
    kwargs_from_depth,
    published_sizes,
    run_blocks,
    transformer_flops,
    transformer_kwargs,
)
from models.editing import Keep, edit, keep_of_scale, mostly_kept
from models.helpers import (
    draw_codes,
    drop_labels,
    filter_top_k_top_p,
    guide,
    gumbel_softmax_with_rng,
    sample_with_top_k_top_p_,
    token_losses,
)
from models.noise import Rng
from models.sampling import forget_null_class, limit_guidance, mark_damaged, sampling_mode, with_finite
from models.scales import (
    ProgressiveSchedule,
    ScaleLayout,
    Weighting,
    about_resizing,
    block_causal,
    nearest_scales,
    resize_positions,
    scale_metrics,
    token_weights,
)
from models.ssg import SSG
from models.tokenizers.vqvae import VQVAE

__all__ = ['VAR', 'VARHF', 'AdaLNSelfAttn', 'ProgressiveSchedule', 'ScaleStep', 'SharedAdaLin',
           'gumbel_softmax_with_rng', 'sample_with_top_k_top_p_']


class ScaleStep(NamedTuple):
    """What sampling one scale produced."""
    k: int
    logits_BlV: torch.Tensor  # after guidance and SSG, before filtering
    idx_Bl: torch.Tensor      # drawn or kept codes, int64
    f_hat: torch.Tensor       # sum so far, (B, Z, P, P), P = patch_nums[-1]; the next adds to it in place


class VAR(PublishedNames, ARModel):
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
        scale_weights: of the training loss, see `scale_shares`; published: 'uniform', 1 / L for each token.
    """

    headline = {'Lm': 'L_mean', 'Lt': 'L_tail', 'Accm': 'acc_mean', 'Acct': 'acc_tail'}
    legend = ('Lm is the cross-entropy of all codes, Accm the percentage of them that are right, Lt and Acct '
              'are those of the finest map')
    selection = 'L_tail'
    parts = PARTS

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
        scale_weights: Weighting = 'uniform',
    ):
        super().__init__(vae_local)
        # 0. hyper-parameters
        self.Cvae = vae_local.channels
        self.V = vae_local.vocab_size
        self.depth = depth
        self.C = embed_dim
        self.D = embed_dim
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.cond_drop_rate = cond_drop_rate
        self.drop_path_rate = drop_path_rate
        self.label_smooth = label_smooth
        self.scale_weights = scale_weights
        self.patch_nums = tuple(patch_nums)
        self.layout = ScaleLayout(self.patch_nums)
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
        self.shared_ada_lin = SharedAdaLin(self.D, self.C) if shared_aln else nn.Identity()
        self.blocks = build_blocks(
            depth,
            drop_path_rate,
            embed_dim=self.C,
            cond_dim=self.D,
            shared_aln=shared_aln,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            attn_l2_norm=attn_l2_norm,
            norm_eps=norm_eps,
            flash_if_available=flash_if_available,
            fused_if_available=fused_if_available,
        )

        # 5. level of each token, and the block-causal mask, which is here for its published key alone
        self.register_buffer('lvl_1L', self.layout.level_L()[None])
        self.register_buffer('attn_bias_for_masking', self.layout.causal_bias()[None, None])

        # 6. head
        self.head_nm = AdaLNBeforeHead(self.C, self.D, norm_eps)
        self.head = nn.Linear(self.C, self.V)

    # ------------------------------------------------------------------------------ training
    def training_loss(self, images_B3HW: torch.Tensor, label_B: torch.Tensor,
                      progress: float = 1.) -> tuple[torch.Tensor, dict[str, Any]]:
        """Cross-entropy of all tokens given the coarser scales (Eq. 6), weighted by `scale_weights`."""
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
        h_BLC = self.before_head(self.dropped(label_B), teacher_BLZ)
        losses = token_losses(self.head, h_BLC, target_BL, self.label_smooth)

        # Weights are those of the whole pyramid, also where some scales are left out, as published.
        weight_L = token_weights(self.layout, self.scale_weights, target_BL.device)[:target_BL.shape[1]]
        weight_L[self.layout.spans[stage][0]:] *= newest_weight
        aux = dict(losses=losses, target_BL=target_BL, stage=stage, newest_weight=newest_weight,
                   num_tokens=target_BL.shape[1])
        return (losses.loss_BL * weight_L).sum(1).mean(), aux

    def forward(self, label_B: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor | None) -> torch.Tensor:
        """Teacher-forced logits; labels are dropped in training mode only.

        Args:
            label_B: (B,) int64 in [0, num_classes].
            x_BLCv_wo_first_l: `idxBl_to_var_input` of the codes, (B, tokens after the first scale, Z); its
                length says how many scales take part. None for the first scale alone.
        Returns:
            (B, first_l + tokens, V) float32.
        """
        h_BLC = self.before_head(self.dropped(label_B), x_BLCv_wo_first_l)
        return self.head(h_BLC).float()                                                    # (B, L, V)

    def dropped(self, label_B: torch.Tensor) -> torch.Tensor:
        """In training mode, the labels with the null class in the place of some."""
        return drop_labels(label_B, self.num_classes, self.cond_drop_rate) if self.training else label_B

    def log_probabilities(self, label_B: torch.Tensor, tokens: list[torch.Tensor],
                          ) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `ARModel`; the tokens are codes (B, l) of all scales, coarse to fine."""
        target_BL = torch.cat(tokens, dim=1)
        with torch.autocast(label_B.device.type, enabled=False):
            teacher_BLZ = self.tokenizer.quantize.idxBl_to_var_input(tokens)
        losses = token_losses(self.head, self.before_head(label_B, teacher_BLZ), target_BL)
        aux = dict(losses=losses, target_BL=target_BL, stage=len(tokens) - 1, newest_weight=1.,
                   num_tokens=target_BL.shape[1])
        return -losses.loss_BL, aux

    def before_head(self, label_B: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor | None) -> torch.Tensor:
        """(B, L, C) float32, of which the head makes logits; see `forward`, but no label is dropped."""
        B = len(label_B)
        num_given = 0 if x_BLCv_wo_first_l is None else x_BLCv_wo_first_l.shape[1]
        L = self.first_l + num_given
        num_scales = self.layout.num_scales_of(L)  # refuses a length that ends within a scale

        # Embeddings are in float32 under any autocast, as published.
        with torch.autocast(label_B.device.type, enabled=False):
            cond_BD = self.class_emb(label_B)                                              # (B, D), D = C
            # The first scale has nothing to see but the class, which is its start token.
            x_BLC = cond_BD[:, None].expand(B, self.first_l, -1) + self.pos_start          # (B, 1, C)
            if x_BLCv_wo_first_l is not None:
                teacher_BLC = self.word_embed(x_BLCv_wo_first_l.float())
                x_BLC = torch.cat([x_BLC, teacher_BLC], dim=1)                             # (B, L, C)
            x_BLC = x_BLC + self.lvl_embed(self.lvl_1L[:, :L]) + self.pos_1LC[:, :L]

        # A token sees its own scale and all coarser ones.
        layout = ScaleLayout(self.patch_nums[:num_scales])
        mask = block_causal(layout, x_BLC.device)
        x_BLC = run_blocks(self.blocks, x_BLC, self.shared_ada_lin(cond_BD), mask)
        return self.head_nm(x_BLC.float(), cond_BD).float()                                # (B, L, C)

    def get_logits(self, h: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        """(B, L, V) float32 of the last block's output (B, L, C) and the class embedding (B, D)."""
        return self._logits(h, self.head_nm.modulation(cond_BD))

    def _logits(self, h_BLC: torch.Tensor, head_mod_B12C: torch.Tensor) -> torch.Tensor:
        h_BLC = self.head_nm.modulated(h_BLC.float(), head_mod_B12C)
        return self.head(h_BLC.float()).float()

    def compile(self, **options: Any) -> None:
        """Compile the blocks; one graph serves all of them."""
        compile_around_attention(self.blocks, **options)

    # ------------------------------------------------------------------------------ sampling
    @property
    def native_side(self) -> int:
        return self.patch_nums[-1] * self.tokenizer.stride

    @torch.no_grad()
    def sample_scales(self, label_B: torch.Tensor, *, cfg: float = 1.5, cfg_from: int = 0, cfg_to: int = -1,
                      ssg: float = 0., ssg_prior: str = 'fused', ssg_schedule: str = 'constant',
                      top_k: int = 0, top_p: float = 0., more_smooth: bool = False, rng: Rng = None,
                      keep: Keep | None = None) -> Iterator[ScaleStep]:
        """Sample scale by scale, one step for each; in eval mode whatever the model's mode is.

        Until it is exhausted or closed, the model keeps a cache and serves nothing else.

        Args:
            label_B: (B,) int64, see `as_labels`.
            cfg: guidance at the last scale; it grows linearly from 0 at the first. 0 is off, and the null
                class is then not computed.
            cfg_from, cfg_to: scales before and after these are not guided, see `limit_guidance`.
            ssg, ssg_prior, ssg_schedule: strength, prior and schedule of `SSG`; 0 is off.
            top_k, top_p: see `filter_top_k_top_p_`; 0 is off.
            more_smooth: mix code embeddings by Gumbel softmax: smoother pictures, worse scores.
            rng: a generator, `ImageNoise`, or None for torch's global generator.
            keep: codes that replace drawn ones; they consume the same noise.
        Raises:
            ValueError: `cfg_from` and `cfg_to` are no scales in this order, or a choice of SSG is unknown.
        """
        B = len(label_B)
        quantize = self.tokenizer.quantize
        scale_k = [1 + cfg * self.layout.ratio(k) for k in range(len(self.patch_nums))]
        scale_k, num_with_null = limit_guidance(scale_k, cfg_from, cfg_to)
        apply_ssg = SSG(self.layout, ssg, ssg_prior, ssg_schedule)

        # With guidance the second half of the batch has the null class.
        if num_with_null:
            null_B = torch.full_like(label_B, self.num_classes)
            label_B = torch.cat([label_B, null_B])
        cond_BD = self.class_emb(label_B)                                                  # (2B, D)
        # What the class does to blocks and head is the same at every scale: a third of the weights of the
        # blocks is read once instead of once per scale.
        shared = self.shared_ada_lin(cond_BD)
        modulations = [block.modulation(shared) for block in self.blocks]                  # (2B, 1, 6, C)
        head_modulation = self.head_nm.modulation(cond_BD)                                 # (2B, 1, 2, C)

        position_1LC = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        next_BlC = (cond_BD[:, None].expand(-1, self.first_l, -1) + self.pos_start
                    + position_1LC[:, :self.first_l])
        f_hat = cond_BD.new_zeros(B, self.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        with sampling_mode(self, self.blocks, capacity=self.layout.num_seen_later):
            for k, pn in enumerate(self.patch_nums):
                # 1. All tokens of the scale in one pass. There is no mask: the cache holds the coarser
                #    scales alone, and all of them may be seen.
                x_BlC = next_BlC                                                           # (2B, pn^2, C)
                for block, mod_B16C in zip(self.blocks, modulations, strict=True):
                    x_BlC = block.modulated(x_BlC, mod_B16C)

                # 2. Guidance: u + s (c - u) of the logits with class and without, s = 1 + cfg * k / (K - 1).
                logits_BlV = self._logits(x_BlC, head_modulation)
                if k < num_with_null:
                    cond_BlV, uncond_BlV = logits_BlV.chunk(2)
                    logits_BlV = guide(cond_BlV, uncond_BlV, scale_k[k])                   # (B, pn^2, V)
                logits_BlV = apply_ssg(k, logits_BlV)

                # 3. Codes: drawn, or given by an edit; then their embeddings.
                drawn_Bl = draw_codes(logits_BlV, top_k, top_p, rng)
                idx_Bl, is_kept_Bl = keep_of_scale(keep, k, drawn_Bl)
                h_BlZ = quantize.lookup(idx_Bl, k)
                if more_smooth:
                    ratio = self.layout.ratio(k)
                    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)  # as published, like the factor 1 + ratio
                    filtered_BlV = filter_top_k_top_p(logits_BlV, top_k, top_p)
                    mix_BlV = gumbel_softmax_with_rng(filtered_BlV.mul(1 + ratio), tau=tau, rng=rng)
                    smooth_BlZ = mix_BlV @ quantize.embedding.weight[quantize.rows(k)]
                    h_BlZ = torch.where(is_kept_Bl[..., None], h_BlZ, smooth_BlZ)

                # 4. The scale is added to the sum of all scales so far (Algorithm 2 of the paper).
                h_BZpp = h_BlZ.transpose(1, 2).reshape(B, self.Cvae, pn, pn)
                f_hat, next_BZpp = quantize.get_next_autoregressive_input(
                    k, len(self.patch_nums), f_hat, h_BZpp)
                yield ScaleStep(k, logits_BlV, idx_Bl, f_hat)

                # 5. That sum, resized to the next side, is what the next scale sees. After the last guided
                #    scale nothing needs the null class, so its half leaves the batch.
                if k < len(self.patch_nums) - 1:
                    begin, end = self.layout.spans[k + 1]
                    next_BlC = self.word_embed(next_BZpp.flatten(2).transpose(1, 2))
                    next_BlC = next_BlC + position_1LC[:, begin:end]
                    if k + 1 < num_with_null:
                        next_BlC = next_BlC.repeat(2, 1, 1)
                    elif k + 1 == num_with_null:
                        modulations, head_modulation = forget_null_class(
                            self.blocks, modulations, head_modulation, B)

    def draw_tokens(self, label_B: torch.Tensor, rng: Rng) -> list[torch.Tensor]:
        """See `ARModel`: codes (B, l) of all scales, coarse to fine."""
        return [step.idx_Bl for step in self.sample_scales(label_B, cfg=0., rng=rng)]

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
        last_step = deque(with_finite(self.sample_scales(label_B, **options)), maxlen=1)
        step, finite_B = last_step.pop()
        return self._decoded(step, finite_B)

    @torch.no_grad()
    def growing(self, labels: torch.Tensor | Sequence[int], *, guidance: float = 2.5, rng: Rng = None,
                **options: Any) -> Iterator[torch.Tensor]:
        """Images (B, 3, H, W) in [0, 1] of the sum after each scale; see `sample`."""
        label_B = self.as_labels(labels, len(labels), rng)
        steps = self.sample_scales(label_B, cfg=guidance - 1, rng=rng, **options)
        for step, finite_B in with_finite(steps):
            yield self._decoded(step, finite_B)

    def _decoded(self, step: ScaleStep, finite_B: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] of the sum after a scale, nan where logits were not finite."""
        return mark_damaged(self.tokenizer.fhat_to_img(step.f_hat).add_(1).mul_(0.5), finite_B)

    # ------------------------------------------------------------------------------ editing
    def edit(self, images_B3HW: torch.Tensor, keep: torch.Tensor, labels: int | Sequence[int] | torch.Tensor,
             *, guidance: float, rng: Rng = None, paste: bool = False, keep_share: float = 0.5,
             **options: Any) -> torch.Tensor:
        """Draw again what a mask does not keep, see `models.editing.edit`: (B, 3, H, W) in [0, 1]."""
        return edit(self, images_B3HW, keep, labels, guidance=guidance, rng=rng, paste=paste,
                    keep_share=keep_share, **options)

    def keep_masks(self, mask_B1HW: torch.Tensor, sizes: Sequence[tuple[int, int]],
                   keep_share: float = 0.5) -> list[torch.Tensor]:
        """Per scale, which codes of an edited image stay: (B or 1, l) bool.

        As published, the finest scale goes by area and the other scales follow from it; a map of up to three
        codes stays as a whole if anything does.

        Args:
            mask_B1HW: 1 where the image is kept, in pixels or in codes of the finest scale.
            keep_share: of the area of a code, or more, that must be kept for the code to stay.
        """
        finest_Bl = mostly_kept(mask_B1HW, sizes[-1], keep_share)
        finest_B1hw = finest_Bl.view(-1, 1, *sizes[-1]).float()
        masks = []
        for height, width in sizes:
            if height * width <= 3:
                mask_Bl = finest_B1hw.amax((2, 3)) > 0
            else:
                resized_B1hw = F.interpolate(finest_B1hw, size=(height, width), mode='bilinear')
                mask_Bl = (resized_B1hw > 0.5).flatten(1)
            masks.append(mask_Bl)
        return masks

    # ------------------------------------------------------------------------------ metrics
    @torch.no_grad()
    def metrics(self, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `scale_metrics`, and in training the stage of progressive training.

        Tails are -1 before the last stage, since the last scale is not trained yet.
        """
        stage = aux['stage']
        stride = self.tokenizer.stride
        layout = ScaleLayout(self.patch_nums[:stage + 1])
        losses = aux['losses']
        metrics = scale_metrics(losses.plain_BL, losses.predicted_BL, aux['target_BL'], layout, stride,
                                self.V if self.training else None)
        if stage < len(self.patch_nums) - 1:
            absent = torch.full_like(metrics['L_mean'], -1)
            metrics |= dict(L_tail=absent, acc_tail=absent.clone())
        if self.training:
            stage_figures = dict(prog_si=stage if self.progressive else -1, prog_wp=aux['newest_weight'],
                                 prog_a_reso=self.patch_nums[stage] * stride)
            for name, value in stage_figures.items():
                metrics[name] = torch.full_like(metrics['L_mean'], value)
        return metrics

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
    kwargs_from_size = staticmethod(kwargs_from_depth)
    published_sizes = staticmethod(published_sizes)

    def init_weights(self, init_adaln: float = 0.5, init_adaln_gamma: float = 1e-5, init_head: float = 0.02,
                     init_std: float = 0.02, conv_std_or_gain: float = 0.02) -> None:
        """See `init_transformer`; pos_start and pos_1LC stay as constructed. The model has no convolution."""
        init_transformer(self, init_adaln, init_adaln_gamma, init_head, init_std)

    def fit_positions(self, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
        """Positions of other maps, resized; a scale has the level of the one that its positions come from."""
        theirs = ScaleLayout(self.kwargs_from_state_dict(state)['patch_nums'])
        if theirs.patch_nums == self.patch_nums:
            return {}, ''
        levels = nearest_scales(self.layout, theirs)
        our_first = ScaleLayout(self.patch_nums[:1])
        their_first = ScaleLayout(theirs.patch_nums[:1])
        fitted = {
            'pos_start': resize_positions(state['pos_start'], our_first, their_first),
            'pos_1LC': resize_positions(state['pos_1LC'], self.layout, theirs),
            'lvl_embed.weight': state['lvl_embed.weight'][levels],
            'lvl_1L': self.lvl_1L,
            'attn_bias_for_masking': self.attn_bias_for_masking,
        }
        return fitted, about_resizing(self.layout, theirs)

    def sharded_parts(self) -> list[nn.Module]:
        return list(self.blocks)

    @property
    def codes_per_image(self) -> int:
        return self.layout.total

    def training_flops(self, num_tokens: int) -> int:
        return transformer_flops(self, num_tokens)

    def no_weight_decay(self) -> set[str]:
        return set(NO_WEIGHT_DECAY)

    @staticmethod
    def tokenizer_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(v_patch_nums=kwargs['patch_nums'])

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        lengths = state['lvl_1L'].flatten().bincount().tolist()
        sides = tuple(math.isqrt(length) for length in lengths)
        return transformer_kwargs(state) | dict(patch_nums=sides)

    def extra_repr(self) -> str:
        return f'patch_nums={self.patch_nums}, drop_path_rate={self.drop_path_rate:g}'


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
        super().__init__(
            VQVAE(**vae_kwargs),
            num_classes=num_classes,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
            shared_aln=shared_aln,
            cond_drop_rate=cond_drop_rate,
            attn_l2_norm=attn_l2_norm,
            patch_nums=patch_nums,
            flash_if_available=flash_if_available,
            fused_if_available=fused_if_available,
        )
