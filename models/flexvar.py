"""FlexVAR: next-scale prediction without residuals, for any number of scales of any size and aspect.

Every scale is a complete code map of the image, so the pyramid may change at each training step and each
sampling run, and given codes may take the place of drawn ones.
Letters: B batch, K scales, L all tokens, l tokens of one scale, C width, D condition width, Z tokenizer
channels, V vocabulary, h w code map, 3HW image. Source: arXiv 2502.20313.
"""
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.attention import compile_around_attention
from models.base import ARModel, Tokenizer
from models.basic_var import (
    NO_WEIGHT_DECAY,
    PARTS,
    AdaLNBeforeHead,
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
from models.editing import Keep, edit, keep_of_scale, mostly_kept, place
from models.helpers import draw_codes, drop_labels, guide, token_losses
from models.noise import Rng
from models.sampling import forget_null_class, limit_guidance, mark_damaged, sampling_mode, with_finite
from models.scales import (
    ScaleLayout,
    Side,
    Weighting,
    as_sizes,
    block_causal,
    check_sizes,
    nearest_scales,
    rect_schedule,
    scale_metrics,
    token_weights,
)
from models.ssg import SSG

GRID = 32  # rows and columns of the position grid, twice the side of the finest published code map
DRAWN_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32)  # at others the published sampler is greedy
REMOVALS = (0.9, 0.95, 0.98, 0.99)  # a uniform number above each of them removes one more scale


@dataclass(frozen=True)
class ScheduleSampler:
    """Draws the sides of the code maps of one training step.

    One step in twenty has `patch_nums`; the others 1, 2, some coarse and fine sides and the last one. Up to
    four of them are then removed, and more until there are no more tokens than in `patch_nums`.

    Args:
        patch_nums: rising from 1. The published list, ending at 16, gives the published sampler; its
            proportions are carried over to any other.
        keep_last: never remove the last side. The published sampler does in a third of the steps.
    """

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    keep_last: bool = False

    def draw(self, rng: Any = random) -> tuple[int, ...]:
        """Sides, coarse to fine; `rng` is python's `random` or a `random.Random`."""
        # One step in twenty has the pyramid of validation.
        sides = list(self.patch_nums) if rng.random() < 0.05 else self._random_sides(rng)

        # A few inner sides are left out now and then, so that steps of different lengths are learnt.
        u = rng.random()
        for threshold in REMOVALS:
            if u > threshold and len(sides) > 3:
                del sides[rng.choice(range(2, len(sides) - 1))]

        # No step costs more than the pyramid of validation: fine sides go until the tokens fit.
        most_tokens = ScaleLayout(self.patch_nums).total
        while ScaleLayout(tuple(sides)).total > most_tokens:
            last_stays = self.keep_last or len(sides) < 4
            end = len(sides) - 1 if last_stays else len(sides)
            del sides[rng.choice(range(max(len(sides) - 4, 1), end))]
        return tuple(sides)

    def _random_sides(self, rng: Any) -> list[int]:
        """1, 2, five coarse sides for every two fine ones, and the last side of the published list."""
        last = self.patch_nums[-1]
        border = last * 10 // 16
        coarse = range(3, border + 1)
        fine = range(max(border + 1, 3), last)
        first = [side for side in self.patch_nums[:-1] if side < 3]  # 1 and 2
        num_inner = len(self.patch_nums) - len(first) - 1
        num_coarse = min(round(num_inner * 5 / 7), len(coarse))
        num_fine = min(num_inner - num_coarse, len(fine))
        inner = rng.sample(coarse, num_coarse)
        inner += rng.sample(fine, num_fine)
        return [*first, *sorted(inner), last]


@dataclass
class FixedSchedule:
    """Takes the place of a `ScheduleSampler` and gives the same pyramid at every step."""

    sides: tuple[int, ...] = ()

    def draw(self) -> tuple[int, ...]:
        """Sides of the pyramid, coarse to fine."""
        return self.sides


class ScaleStep(NamedTuple):
    """What sampling one scale produced."""
    k: int
    size: tuple[int, int]
    logits_BlV: torch.Tensor  # after guidance and SSG, before filtering
    idx_Bl: torch.Tensor      # drawn or kept codes, int64


def published_guidance(layout: ScaleLayout, cfg: float, max_pn: int) -> list[float]:
    """s of `guide` at every scale, as published; see `FlexVAR.sample_scales`."""
    num_scales = len(layout.sizes)
    scale_k = []
    for k, size in enumerate(layout.sizes):
        # It reaches cfg at the tenth scale and grows on from there; maps beyond max_pn have cfg itself.
        ratio = k / min(num_scales - 1, 9) if num_scales > 1 else 1.
        strength = cfg * ratio if max(size) <= max_pn else cfg
        scale_k.append(1 + strength)
    return scale_k


def sinusoid_grid(width: int) -> torch.Tensor:
    """(1, C, GRID, GRID): sines of the row in even channels, cosines of the column in odd ones."""
    frequency = torch.exp(-torch.arange(0, width, 2) * (math.log(10000) / width))
    angle = torch.arange(GRID)[None] * frequency[:, None]                                  # (C / 2, GRID)
    rows = angle.sin()[:, :, None].expand(-1, GRID, GRID)
    columns = angle.cos()[:, None].expand(-1, GRID, GRID)
    pairs = torch.stack([rows, columns], dim=1)                                            # (C / 2, 2, ...)
    return pairs.reshape(1, width, GRID, GRID)


class FlexVAR(PublishedNames, ARModel):
    """Next-scale transformer over a pyramid of complete code maps.

    Args:
        vae_local: frozen tokenizer (FlexVAE), kept as a plain reference.
        num_classes, depth, embed_dim, num_heads, mlp_ratio, drop_rate, attn_drop_rate, drop_path_rate,
            norm_eps, shared_aln, cond_drop_rate, attn_l2_norm, flash_if_available, fused_if_available,
            label_smooth: as for VAR.
        token_dropout_p: accepted for compatibility, without effect in the published code, too.
        patch_nums: sides of the code maps of validation and of sampling by default, coarse to fine; training
            draws others, see `ScheduleSampler`.
        keep_last: see `ScheduleSampler`.
        scale_weights: of the training loss, see `scale_shares`; published: 'uniform', all tokens alike.
    Raises:
        ValueError: `patch_nums` do not rise from 1, or the width is odd.
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
        token_dropout_p: float = 0.05,
        attn_l2_norm: bool = False,
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        flash_if_available: bool = True,
        fused_if_available: bool = True,
        label_smooth: float = 0.,
        keep_last: bool = False,
        scale_weights: Weighting = 'uniform',
    ):
        super().__init__(vae_local)
        # 0. hyper-parameters
        sides = [height for height, width in as_sizes(patch_nums) if height == width]
        if len(sides) != len(patch_nums) or sides[:1] != [1] or sides != sorted(set(sides)):
            raise ValueError(f'expected sides of square code maps that rise from 1, got {tuple(patch_nums)}: '
                             'oblong ones are for sampling')
        if embed_dim % 2:
            raise ValueError(f'expected an even width for sines and cosines of positions, got {embed_dim}')
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
        self.patch_nums = tuple(sides)
        self.layout = ScaleLayout(self.patch_nums)
        self.schedule = ScheduleSampler(self.patch_nums, keep_last)
        std = (1 / self.C / 3) ** 0.5

        # 1. input: code embedding
        self.word_embed = nn.Linear(self.Cvae, self.C)

        # 2. class embedding, with the null class as its last row
        self.class_emb = nn.Embedding(num_classes + 1, self.C)
        nn.init.trunc_normal_(self.class_emb.weight, std=std)
        self.pos_start = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.C), std=std))

        # 3. one grid of positions, resized to every scale; nothing else tells the scales apart
        self.pos_1LC = nn.Parameter(sinusoid_grid(self.C))  # (1, C, GRID, GRID) under its published name

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

        # 5. head
        self.head_nm = AdaLNBeforeHead(self.C, self.D, norm_eps)
        self.head = nn.Linear(self.C, self.V)

    def positions(self, size: tuple[int, int], pos_mode: str = 'stretch') -> torch.Tensor:
        """(1, h * w, C) positions of a code map; beyond GRID rows or columns, neighbours share one.

        Args:
            pos_mode: 'stretch' covers the whole grid with any map; 'crop' the part that keeps its aspect.
        """
        rows, columns = size
        extent = size if pos_mode == 'stretch' else (max(size), max(size))
        grid_1Chw = F.interpolate(self.pos_1LC, size=extent, mode='area')
        return grid_1Chw[:, :, :rows, :columns].flatten(2).transpose(1, 2)

    def next_input(self, idx_Bl: torch.Tensor, size: tuple[int, int], next_size: tuple[int, int],
                   ) -> torch.Tensor:
        """(B, next l, Z): the vectors of one scale's codes, resized to the next scale."""
        code_BZhw = self.tokenizer.quantize.embed(idx_Bl, size)
        next_BZhw = F.interpolate(code_BZhw, size=next_size, mode='bicubic')
        return next_BZhw.flatten(2).transpose(1, 2)

    # ------------------------------------------------------------------------------ training
    def training_loss(self, images_B3HW: torch.Tensor, label_B: torch.Tensor,
                      progress: float = 1.) -> tuple[torch.Tensor, dict[str, Any]]:
        """Cross-entropy of all tokens given the coarser scales, their mean if all weigh alike.

        Training draws the pyramid anew, and weights are those of the pyramid of the step.
        """
        # Every scale is a complete image, so the sides of a step are free; validation has fixed ones.
        patch_nums = self.schedule.draw() if self.training else self.patch_nums
        idx_kBl = self.tokenizer.encode(images_B3HW, patch_nums)
        target_BL = torch.cat(idx_kBl, dim=1)
        teacher_BLZ = self.teacher_input(idx_kBl, patch_nums)
        label_B = self.dropped(label_B)
        h_BLC = self.before_head(label_B, teacher_BLZ, patch_nums)
        losses = token_losses(self.head, h_BLC, target_BL, self.label_smooth)
        aux = dict(losses=losses, target_BL=target_BL, patch_nums=patch_nums, label_B=label_B,
                   num_tokens=target_BL.shape[1])
        if self.scale_weights == 'uniform':
            return losses.loss_BL.mean(), aux
        weight_L = token_weights(*self.weighting_of(patch_nums), target_BL.device)
        return (losses.loss_BL * weight_L).sum(1).mean(), aux

    def weighting_of(self, patch_nums: tuple[int, ...]) -> tuple[ScaleLayout, Weighting]:
        """The layout of a pyramid and how its scales share the loss.

        Numbers are those of the sides in `patch_nums` of the model: other sides have that of the nearest one.
        """
        layout = ScaleLayout(patch_nums)
        if isinstance(self.scale_weights, str):
            return layout, self.scale_weights
        return layout, tuple(self.scale_weights[k] for k in nearest_scales(layout, self.layout))

    @torch.no_grad()
    def teacher_input(self, idx_kBl: list[torch.Tensor], patch_nums: Sequence[Side]) -> torch.Tensor | None:
        """Teacher-forcing input for every scale but the first.

        Args:
            idx_kBl: codes of K scales, (B, l) int64 each.
        Returns:
            (B, L - 1, Z) float32; None for a single scale.
        """
        sizes = as_sizes(patch_nums)
        inputs = []
        with torch.autocast(idx_kBl[0].device.type, enabled=False):
            for k, next_size in enumerate(sizes[1:]):
                inputs.append(self.next_input(idx_kBl[k], sizes[k], next_size))
        return torch.cat(inputs, dim=1) if inputs else None

    def forward(self, label_B: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor | None,
                infer_patch_nums: Sequence[Side] | None = None) -> torch.Tensor:
        """Teacher-forced logits; labels are dropped in training mode only.

        Args:
            label_B: (B,) int64 in [0, num_classes].
            x_BLCv_wo_first_l: see `teacher_input`.
            infer_patch_nums: sides of its scales, the first one included; None means `patch_nums`.
        Returns:
            (B, L, V) float32.
        Raises:
            ValueError: the input has another number of tokens than these scales.
        """
        h_BLC = self.before_head(self.dropped(label_B), x_BLCv_wo_first_l, infer_patch_nums)
        return self.head(h_BLC).float()                                                    # (B, L, V)

    def dropped(self, label_B: torch.Tensor) -> torch.Tensor:
        """In training mode, the labels with the null class in the place of some."""
        return drop_labels(label_B, self.num_classes, self.cond_drop_rate) if self.training else label_B

    def log_probabilities(self, label_B: torch.Tensor, tokens: list[torch.Tensor],
                          ) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `ARModel`; the tokens are codes (B, l) of square maps, coarse to fine."""
        patch_nums = [math.isqrt(idx_Bl.shape[1]) for idx_Bl in tokens]
        target_BL = torch.cat(tokens, dim=1)
        h_BLC = self.before_head(label_B, self.teacher_input(tokens, patch_nums), patch_nums)
        losses = token_losses(self.head, h_BLC, target_BL)
        aux = dict(losses=losses, target_BL=target_BL, patch_nums=patch_nums, num_tokens=target_BL.shape[1])
        return -losses.loss_BL, aux

    def before_head(self, label_B: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor | None,
                    infer_patch_nums: Sequence[Side] | None = None, has_start: bool = True) -> torch.Tensor:
        """(B, L, C) float32, of which the head makes logits; see `forward`, but no label is dropped.

        Args:
            has_start: whether `pos_start` is added to the first token.
        """
        layout = ScaleLayout(as_sizes(self.patch_nums if infer_patch_nums is None else infer_patch_nums))
        check_sizes(layout.sizes)
        B = len(label_B)
        num_given = 0 if x_BLCv_wo_first_l is None else x_BLCv_wo_first_l.shape[1]
        if num_given != layout.total - 1:
            raise ValueError(f'expected {layout.total - 1} tokens after the first for scales of '
                             f'{layout.sizes}, got {num_given}: pass the sides that the input was made with')

        # Embeddings are in float32 under any autocast, as published.
        with torch.autocast(label_B.device.type, enabled=False):
            cond_BD = self.class_emb(label_B)                                              # (B, D), D = C
            # The first scale has nothing to see but the class, which is its start token.
            start_BC = cond_BD + self.pos_start[0] if has_start else cond_BD
            x_BLC = start_BC.view(B, 1, -1)                                                # (B, 1, C)
            if num_given:
                teacher_BLC = self.word_embed(x_BLCv_wo_first_l.float())
                x_BLC = torch.cat([x_BLC, teacher_BLC], dim=1)                             # (B, L, C)
            position_1LC = torch.cat([self.positions(size) for size in layout.sizes], dim=1)
            x_BLC = x_BLC + position_1LC

        # A token sees its own scale and all coarser ones, which follow from the sides of this call.
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
        """Compile the blocks, for any number of tokens at once: the pyramid changes at every step."""
        compile_around_attention(self.blocks, dynamic=True, **options)

    # ------------------------------------------------------------------------------ sampling
    @property
    def native_side(self) -> int:
        return self.patch_nums[-1] * self.tokenizer.stride

    @torch.no_grad()
    def sample_scales(
        self,
        label_B: torch.Tensor,
        *,
        infer_patch_nums: Sequence[Side] | None = None,
        cfg: float = 1.5,
        cfg_from: int = 0,
        cfg_to: int = -1,
        ssg: float = 0.,
        ssg_prior: str = 'fused',
        ssg_schedule: str = 'constant',
        top_k: int = 0,
        top_p: float = 0.,
        max_pn: int = 16,
        used_llamagen_cfg: bool = False,
        invalid_ids: Sequence[int] | None = None,
        greedy_unseen: bool = True,
        pos_mode: str = 'stretch',
        rng: Rng = None,
        keep: Keep | None = None,
    ) -> Iterator[ScaleStep]:
        """Sample scale by scale, one step for each; in eval mode whatever the model's mode is.

        Until it is exhausted or closed, the model keeps a cache and serves nothing else.

        Args:
            label_B: (B,) int64, see `as_labels`.
            infer_patch_nums: sides p, or (rows, columns), of the scales; None means `patch_nums`.
            cfg: guidance; it grows linearly from 0 at the first scale to `cfg` at the last. Of more than ten
                scales the tenth has `cfg`, and it grows on from there, as published. 0 is off, and the null
                class is then not computed.
            cfg_from, cfg_to: scales before and after these are not guided, see `limit_guidance`.
            ssg, ssg_prior, ssg_schedule: strength, prior and schedule of `SSG`; 0 is off.
            top_k, top_p: see `filter_top_k_top_p_`; 0 is off.
            max_pn: scales longer than this take the most likely codes, with constant `cfg`.
            used_llamagen_cfg: guide every scale by uncond + cfg * (cond - uncond) instead; 1 is then off.
            invalid_ids: codes that must not be drawn.
            greedy_unseen: take the most likely codes at sides that are not in DRAWN_SIDES, too.
            pos_mode: see `positions`.
            rng: a generator, `ImageNoise`, or None for torch's global generator.
            keep: codes that replace drawn ones; they consume the same noise.
        Raises:
            ValueError: no scales, a first one that is not 1x1, another pos_mode, an unknown choice of SSG,
                or `cfg_from` and `cfg_to` that are no scales in this order.
        """
        layout = ScaleLayout(as_sizes(self.patch_nums if infer_patch_nums is None else infer_patch_nums))
        check_sizes(layout.sizes)
        if pos_mode not in ('stretch', 'crop'):
            raise ValueError(f"pos_mode must be 'stretch' or 'crop', got {pos_mode!r}")
        B = len(label_B)
        num_scales = len(layout.sizes)
        scale_k = [cfg] * num_scales if used_llamagen_cfg else published_guidance(layout, cfg, max_pn)
        scale_k, num_with_null = limit_guidance(scale_k, cfg_from, cfg_to)
        apply_ssg = SSG(layout, ssg, ssg_prior, ssg_schedule)

        # With guidance the second half of the batch has the null class.
        if num_with_null:
            null_B = torch.full_like(label_B, self.num_classes)
            label_B = torch.cat([label_B, null_B])
        cond_BD = self.class_emb(label_B)                                                  # (2B, D)
        # What the class does to blocks and head is the same at every scale.
        shared = self.shared_ada_lin(cond_BD)
        modulations = [block.modulation(shared) for block in self.blocks]                  # (2B, 1, 6, C)
        head_modulation = self.head_nm.modulation(cond_BD)                                 # (2B, 1, 2, C)

        x_BlC = (cond_BD + self.pos_start[0])[:, None] + self.positions((1, 1), pos_mode)  # (2B, 1, C)
        with sampling_mode(self, self.blocks, capacity=layout.num_seen_later):
            for k, size in enumerate(layout.sizes):
                # 1. All tokens of the scale in one pass. There is no mask: the cache holds the coarser
                #    scales alone, and all of them may be seen.
                for block, mod_B16C in zip(self.blocks, modulations, strict=True):
                    x_BlC = block.modulated(x_BlC, mod_B16C)

                # 2. Guidance: u + s (c - u) of the logits with class and without.
                logits_BlV = self._logits(x_BlC, head_modulation)
                if invalid_ids is not None:
                    logits_BlV[:, :, list(invalid_ids)] = -100.
                if k < num_with_null:
                    cond_BlV, uncond_BlV = logits_BlV.chunk(2)
                    logits_BlV = guide(cond_BlV, uncond_BlV, scale_k[k])                   # (B, l, V)
                logits_BlV = apply_ssg(k, logits_BlV)

                # 3. Codes: the most likely ones at sides that the published code does not draw at, else
                #    drawn, or given by an edit.
                greedy = max(size) > max_pn or (greedy_unseen and max(size) not in DRAWN_SIDES)
                num_likely = 1 if greedy else top_k
                drawn_Bl = draw_codes(logits_BlV, num_likely, top_p, rng)
                idx_Bl, _ = keep_of_scale(keep, k, drawn_Bl)
                yield ScaleStep(k, size, logits_BlV, idx_Bl)

                # 4. The next scale sees the map of this one, resized; there is no sum, unlike in VAR. After
                #    the last guided scale nothing needs the null class, so its half leaves the batch.
                if k < num_scales - 1:
                    next_size = layout.sizes[k + 1]
                    x_BlC = self.word_embed(self.next_input(idx_Bl, size, next_size))
                    x_BlC = x_BlC + self.positions(next_size, pos_mode)
                    if k + 1 < num_with_null:
                        x_BlC = x_BlC.repeat(2, 1, 1)
                    elif k + 1 == num_with_null:
                        modulations, head_modulation = forget_null_class(
                            self.blocks, modulations, head_modulation, B)

    def encoding_of_step(self) -> tuple[tuple[int, ...]]:
        return (self.schedule.draw(),)

    def draw_tokens(self, label_B: torch.Tensor, rng: Rng,
                    patch_nums: Sequence[int] | None = None) -> list[torch.Tensor]:
        """See `ARModel`: codes (B, l) of square maps of these sides, all of them drawn."""
        sides = patch_nums or self.patch_nums
        steps = self.sample_scales(label_B, infer_patch_nums=sides, cfg=0., max_pn=max(sides),
                                   greedy_unseen=False, rng=rng)
        return [step.idx_Bl for step in steps]

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        vqvae: Tokenizer | None,
        B: int,
        label_B: int | Sequence[int] | torch.Tensor | None,
        infer_patch_nums: Sequence[Side],
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.,
        more_smooth: bool = False,
        max_pn: int = 16,
        used_llamagen_cfg: bool = False,
        invalid_ids: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Images (B, 3, H, W), nominally in [-1, 1] but not clamped: the published call.

        Args:
            vqvae: the tokenizer of this model, or None.
            label_B: see `as_labels`.
            g_seed: seeds the model's own generator, so a batch repeats; None draws from torch's global one.
            others: see `sample_scales`.
        Raises:
            ValueError: another tokenizer, or `more_smooth`, which this model does not have.
        """
        if vqvae not in (None, self.tokenizer):
            raise ValueError('expected the tokenizer that this FlexVAR was built with, got another one: '
                             'pass that one, or None')
        if more_smooth:
            raise ValueError('FlexVAR has no more_smooth: leave it out')
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        return self._pixels(
            self.as_labels(label_B, B, rng),
            infer_patch_nums=infer_patch_nums,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            max_pn=max_pn,
            used_llamagen_cfg=used_llamagen_cfg,
            invalid_ids=invalid_ids,
            rng=rng,
        )

    def sample(self, labels: torch.Tensor | Sequence[int], *, guidance: float = 3.5, rng: Rng = None,
               infer_patch_nums: Sequence[Side] | None = None, image_size: tuple[int, int] | None = None,
               **options: Any) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1].

        Args:
            guidance: the published cfg + 1, or cfg itself with `used_llamagen_cfg`.
            image_size: height and width in pixels; the sides are stretched to it, see `rect_schedule`.
            others: see `sample_scales`.
        Raises:
            ValueError: `image_size` is no multiple of the tokenizer's stride.
        """
        options = self._scale_options(guidance, infer_patch_nums, image_size, **options)
        pixels = self._pixels(self.as_labels(labels, len(labels), rng), rng=rng, **options)
        return pixels.clamp_(-1, 1).add_(1).mul_(0.5)

    @torch.no_grad()
    def growing(self, labels: torch.Tensor | Sequence[int], *, guidance: float = 3.5, rng: Rng = None,
                infer_patch_nums: Sequence[Side] | None = None, image_size: tuple[int, int] | None = None,
                **options: Any) -> Iterator[torch.Tensor]:
        """Images (B, 3, h, w) in [0, 1] of the map of each scale, at its own size; see `sample`."""
        options = self._scale_options(guidance, infer_patch_nums, image_size, **options)
        label_B = self.as_labels(labels, len(labels), rng)
        for step, finite_B in with_finite(self.sample_scales(label_B, rng=rng, **options)):
            yield self._decoded(step, finite_B).clamp_(-1, 1).add_(1).mul_(0.5)

    def _scale_options(self, guidance: float, infer_patch_nums: Sequence[Side] | None,
                       image_size: tuple[int, int] | None, **options: Any) -> dict[str, Any]:
        """Options of `sample_scales` from those of `sample`."""
        if image_size is not None:
            base = self.patch_nums if infer_patch_nums is None else infer_patch_nums
            infer_patch_nums = rect_schedule(base, *self.tokenizer.map_size(*image_size))
        cfg = guidance if options.get('used_llamagen_cfg', False) else guidance - 1
        return dict(cfg=cfg, infer_patch_nums=infer_patch_nums, **options)

    @torch.no_grad()
    def _pixels(self, label_B: torch.Tensor, **options: Any) -> torch.Tensor:
        last_step = deque(with_finite(self.sample_scales(label_B, **options)), maxlen=1)
        step, finite_B = last_step.pop()
        return self._decoded(step, finite_B)

    def _decoded(self, step: ScaleStep, finite_B: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, h, w) of the map of a scale, not clamped, nan where logits were not finite."""
        code_BZhw = self.tokenizer.quantize.embed(step.idx_Bl, step.size)
        return mark_damaged(self.tokenizer.pixels(code_BZhw), finite_B)

    # ------------------------------------------------------------------------------ image to image
    def keep_masks(self, mask_B1HW: torch.Tensor, sizes: Sequence[tuple[int, int]],
                   keep_share: float = 0.5) -> list[torch.Tensor]:
        """Per scale, which codes of an edited image stay: those whose cells lie far enough inside the mask.

        Args:
            mask_B1HW: 1 where the image is kept, in pixels.
            keep_share: of the area of a code, or more, that must be kept for the code to stay.
        Returns:
            (B or 1, l) bool, coarse to fine.
        """
        return [mostly_kept(mask_B1HW, size, keep_share) for size in sizes]

    def edit(self, images_B3HW: torch.Tensor, keep: torch.Tensor, labels: int | Sequence[int] | torch.Tensor,
             *, guidance: float, rng: Rng = None, paste: bool = False, keep_share: float = 0.5,
             infer_patch_nums: Sequence[Side] | None = None, **options: Any) -> torch.Tensor:
        """Draw again what a mask does not keep in images of any size, see `models.editing.edit`.

        Args:
            infer_patch_nums: sides, which end at the image size; None stretches `patch_nums` to it.
        """
        if infer_patch_nums is None:
            size = self.tokenizer.map_size(*images_B3HW.shape[-2:])
            infer_patch_nums = rect_schedule(self.patch_nums, *size)
        check_sizes(as_sizes(infer_patch_nums))
        return edit(self, images_B3HW, keep, labels, guidance=guidance, rng=rng, paste=paste,
                    keep_share=keep_share, infer_patch_nums=infer_patch_nums, **options)

    def expand(self, images_B3HW: torch.Tensor, size: tuple[int, int], corner: tuple[int, int],
               labels: int | Sequence[int] | torch.Tensor, **options: Any) -> torch.Tensor:
        """Draw around images, on a larger canvas; codes stay where all of their area is known.

        Args:
            size: height and width of the canvas in pixels.
            corner: row and column of the image's upper left corner on it.
            labels, options: as for `edit`.
        Returns:
            (B, 3, *size) in [0, 1].
        """
        canvas_B3HW, mask_HW = place(images_B3HW, size, corner)
        return self.edit(canvas_B3HW, mask_HW, labels, **dict(keep_share=1.) | options)

    @torch.no_grad()
    def refine(self, images_B3HW: torch.Tensor, labels: int | Sequence[int] | torch.Tensor, *, start: int,
               guidance: float, rng: Rng = None, image_size: tuple[int, int] | None = None,
               infer_patch_nums: Sequence[Side] | None = None, **options: Any) -> torch.Tensor:
        """Draw the fine scales of images again, at the same size or another one.

        Args:
            start: scales up to this side are those of the images.
            image_size: height and width of the result in pixels; None means that of the images.
            infer_patch_nums: sides, stretched to `image_size`; None means `patch_nums`.
            labels, guidance, rng, options: as for `sample`.
        Returns:
            (B, 3, *image_size) in [0, 1].
        Raises:
            ValueError: no scale is as small as `start`, or none is finer.
        """
        base = self.patch_nums if infer_patch_nums is None else infer_patch_nums
        height, width = image_size or images_B3HW.shape[-2:]
        sizes = rect_schedule(base, *self.tokenizer.map_size(height, width))
        kept_sizes = list(takewhile(lambda size: max(size) <= start, sizes))
        if not 0 < len(kept_sizes) < len(sizes):
            raise ValueError(f'expected start in 1..{max(sizes[-1]) - 1}, so that some scales are kept and '
                             f'some are drawn, got {start}')
        idx_kBl = self.tokenizer.encode(images_B3HW, kept_sizes)
        keep = [(idx_Bl, torch.ones_like(idx_Bl, dtype=torch.bool)) for idx_Bl in idx_kBl]
        return self.sample(self.as_labels(labels, len(images_B3HW), rng), guidance=guidance, rng=rng,
                           infer_patch_nums=sizes, keep=keep, **options)

    # ------------------------------------------------------------------------------ metrics
    @torch.no_grad()
    def metrics(self, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """See `scale_metrics`; tails are of the last scale of the step, which training draws."""
        layout = ScaleLayout(tuple(aux['patch_nums']))
        stride = self.tokenizer.stride
        losses = aux['losses']
        return scale_metrics(losses.plain_BL, losses.predicted_BL, aux['target_BL'], layout, stride,
                             self.V if self.training else None)

    def training_state(self) -> dict[str, Any]:
        return dict(patch_nums=list(self.patch_nums))

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Refuse another pyramid: validation scores would not compare.

        Raises:
            ValueError: the training was begun with other sides.
        """
        if state['patch_nums'] != list(self.patch_nums):
            raise ValueError(f'the checkpoint was trained with the sides {state["patch_nums"]}, got '
                             f'{list(self.patch_nums)}: pass the same --pn, or another output folder')

    def config_state(self, progress: float) -> dict[str, Any]:
        resos = [pn * self.tokenizer.stride for pn in self.patch_nums]
        return dict(patch_nums=list(self.patch_nums), resos=resos, label_smooth=self.label_smooth)

    # ------------------------------------------------------------------------------ weights
    kwargs_from_size = staticmethod(kwargs_from_depth)
    published_sizes = staticmethod(published_sizes)

    def init_weights(self, init_adaln: float = 0.5, init_adaln_gamma: float = 1e-5, init_head: float = 0.02,
                     init_std: float = 0.02, conv_std_or_gain: float = 0.02) -> None:
        """See `init_transformer`; pos_start and pos_1LC stay as constructed. The model has no convolution."""
        init_transformer(self, init_adaln, init_adaln_gamma, init_head, init_std)

    def take_largest_steps(self) -> None:
        self.schedule = FixedSchedule(self.patch_nums)  # no drawn pyramid has more tokens

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
    def kwargs_from_config(config: dict[str, Any]) -> dict[str, Any]:
        return dict(patch_nums=tuple(config['patch_nums'])) if 'patch_nums' in config else {}

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        _, _, rows, columns = state['pos_1LC'].shape  # VAR has a table there
        if (rows, columns) != (GRID, GRID):
            raise ValueError(f'pos_1LC is a grid of {rows}x{columns}')
        return transformer_kwargs(state)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As torch's, but without the mask that published files hold, which belongs to one pyramid."""
        weights = {name: t for name, t in state_dict.items() if name != 'attn_bias_for_masking'}
        return super().load_state_dict(weights, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        return f'patch_nums={self.patch_nums}, drop_path_rate={self.drop_path_rate:g}'
