"""Multi-scale residual quantizer: an image feature as K coarse-to-fine maps of codes that sum up to it.

Letters: B batch, K scales, Z code channels, V vocabulary, N all queries of a scale, h w feature map.
Source: arXiv 2404.02905, Algorithms 1 and 2; upstream's class VectorQuantizer2.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import dist
from models.base import at_least_float32
from models.helpers import draw_rows
from models.scales import Side, as_sizes, scale_name
from models.tokenizers.codebook import CodebookUpkeep, float32_matmul, kmeans, nearest, squared_distances


def phi_index(num_phis: int, k: int, num_scales: int) -> int:
    """Which of `num_phis` convolutions serves scale k of `num_scales`: the nearest of evenly spaced ticks.

    Scales 2 and 7 of 10 lie exactly between two ticks; float64 rounding of this very expression decides them,
    and published weights depend on it. A single scale uses phi 0.
    """
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1))))


class Phi(nn.Conv2d):
    """(1 - r) h + r conv(h): the residual convolution after each up-sampled code map."""

    def __init__(self, channels: int, ratio: float):
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h.mul(1 - self.ratio) + super().forward(h).mul(self.ratio)


class PhiBank(nn.Module):
    """`count` phi convolutions shared by the scales; r = |ratio|, and below 1e-6 phi is the identity.

    The sharing mode decides only the key under which the published files keep them:
    share 0 `{i}` (one per scale), 1 `qresi`, n `qresi_ls.{i}`.
    """

    def __init__(self, channels: int, ratio: float, share: int, num_scales: int):
        super().__init__()
        count = share or num_scales
        self.phis = [Phi(channels, abs(ratio)) if abs(ratio) > 1e-6 else nn.Identity() for _ in range(count)]
        if share == 1:
            self.qresi = self.phis[0]
        elif share > 1:
            self.qresi_ls = nn.ModuleList(self.phis)
        else:
            for i, phi in enumerate(self.phis):
                self.add_module(str(i), phi)

    def forward(self, h: torch.Tensor, k: int, num_scales: int) -> torch.Tensor:
        return self.phis[phi_index(len(self.phis), k, num_scales)](h)


def weighted_mse(a: torch.Tensor, b: torch.Tensor, weight_B: torch.Tensor | None) -> torch.Tensor:
    """Mean squared error, every image weighted; None weighs all the same."""
    if weight_B is None:
        return F.mse_loss(a, b)
    return ((a - b).square().flatten(1).mean(1) * weight_B).mean()


def rotated(f_BZhw: torch.Tensor, q_BZhw: torch.Tensor) -> torch.Tensor:
    """q with the gradient of f rotated and rescaled onto it, per position (arXiv 2410.06424, Sec. 4.2)."""
    u = F.normalize(f_BZhw.detach(), dim=1)
    v = F.normalize(q_BZhw, dim=1)
    w = F.normalize(u + v, dim=1)
    scale = q_BZhw.norm(dim=1, keepdim=True) / f_BZhw.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    along_w, along_u = ((f_BZhw * t).sum(1, keepdim=True) for t in (w, u))
    return scale * (f_BZhw - 2 * along_w * w + 2 * along_u * v)


class ScaleCode(NamedTuple):
    """One step of the residual loop."""
    k: int
    query_NZ: torch.Tensor   # what was quantised, N = B * ph * pw in (image, row, column) order
    idx_Bhw: torch.Tensor    # its codes, int64
    h_BZhw: torch.Tensor     # their contribution to f_hat, at full size
    rest_BZhw: torch.Tensor  # what was left before


class Quantised(NamedTuple):
    """Outcome of quantising with gradients."""
    f_hat_BZhw: torch.Tensor           # straight-through: its gradient goes to f, not to codes or phi
    loss: torch.Tensor
    parts: dict[str, torch.Tensor]     # detached scalars worth logging
    codes: dict[str, torch.Tensor]     # (B, l) int64 by scale; empty before the codebook has started


@dataclass(frozen=True)
class QuantizerTraining:
    """How codes and decoder are kept from collapse; nothing of it is part of the weights.

    Attributes:
        ema, restart: see `CodebookUpkeep`.
        defer_steps: steps without quantisation at the start; k-means then places the codes.
        scale_drop: share of the images that keep a random number of leading scales only.
        entropy: weight of mean entropy - entropy of the mean, of soft assignments at temperature 0.1.
        rotation: rotate and rescale the gradient (arXiv 2410.06424) where it is copied else.
    """
    ema: bool = True
    restart: bool = True
    defer_steps: int = 0
    scale_drop: float = 0.
    entropy: float = 0.
    rotation: bool = False


ENTROPY_TEMPERATURE = 0.1
KMEANS_IMAGES = 4096   # images whose features place the codes, at least, where the deferral is long enough
MIN_KEPT_SHARE = 0.3   # of the scales, under scale dropout


class VectorQuantizer2(nn.Module):
    """Shared codebook over all scales, phi convolutions, and the running sum f_hat.

    Args:
        vocab_size: V, rows of the codebook.
        Cvae: Z, width of a code.
        using_znorm: compare directions instead of distances; the code used is still the raw row.
        beta: weight of the commitment term.
        default_qresi_counts: phi convolutions when `share_quant_resi` is 0; 0 means one per scale.
        v_patch_nums: sides of the code maps, coarse to fine.
        quant_resi: ratio r of phi.
        share_quant_resi: 0 one phi per scale, 1 a single one, n >= 2 that many, spread over the scales.
        unshared: V codes for every scale alone; such weights fit no published model.
        measures: what keeps training from collapse; None is the published training, by gradient alone.
    """

    def __init__(self, vocab_size: int, Cvae: int, using_znorm: bool, beta: float = 0.25,
                 default_qresi_counts: int = 0, v_patch_nums: Sequence[Side] | None = None,
                 quant_resi: float = 0.5, share_quant_resi: int = 4, unshared: bool = False,
                 measures: QuantizerTraining | None = None):
        super().__init__()
        self.vocab_size = vocab_size
        self.Cvae = Cvae
        self.using_znorm = using_znorm
        self.beta = beta
        self.v_patch_nums = tuple(v_patch_nums)
        num_scales = len(self.v_patch_nums)
        self.quant_resi = PhiBank(Cvae, quant_resi, share_quant_resi,
                                  default_qresi_counts or num_scales)
        used = {phi_index(len(self.quant_resi.phis), k, num_scales) for k in range(num_scales)}
        for i, phi in enumerate(self.quant_resi.phis):
            phi.requires_grad_(i in used)  # short pyramids leave some out, and DDP waits for every gradient
        self.register_buffer('ema_vocab_hit_SV', torch.zeros(num_scales, vocab_size))
        self.record_hit = 0  # training steps that the averages in ema_vocab_hit_SV have seen
        self.num_positions = 0  # B * h * w of the last step on this rank
        self.unshared = unshared
        self.embedding = nn.Embedding(vocab_size * (num_scales if unshared else 1), Cvae)
        self.measures = measures or QuantizerTraining(ema=False, restart=False)
        self.upkeeps = [CodebookUpkeep(self.embedding, measures.ema, measures.restart, self.rows(k))
                        for k in range(num_scales if unshared else 1)] if measures else []
        self.steps_waited = 0   # of measures.defer_steps
        self.gathered: list[torch.Tensor] = []   # features of the global batch, for k-means
        self._features: list[torch.Tensor] = []  # the same of this rank and step

    def eini(self, eini: float) -> None:
        """Initialise the codebook: e > 0 truncated normal of std e, e < 0 uniform in +-|e| / V."""
        if eini > 0:
            nn.init.trunc_normal_(self.embedding.weight, std=eini)
        elif eini < 0:
            self.embedding.weight.data.uniform_(-abs(eini) / self.vocab_size, abs(eini) / self.vocab_size)

    # ------------------------------------------------------------------------------ the algorithm, once
    def rows(self, k: int) -> slice:
        """The codes of scale k in the embedding."""
        return slice(k * self.vocab_size, (k + 1) * self.vocab_size) if self.unshared else slice(None)

    @torch.no_grad()
    def nearest_code(self, query_NZ: torch.Tensor, k: int = 0) -> torch.Tensor:
        """(N,) int64 index of the closest code of scale k; the first one on ties."""
        table_VZ = self.embedding.weight[self.rows(k)]
        if not self.using_znorm:
            return squared_distances(query_NZ, table_VZ).argmin(1)
        with float32_matmul():
            return (F.normalize(query_NZ, dim=-1) @ F.normalize(table_VZ, dim=-1).T).argmax(1)

    def lookup(self, idx_Bl: torch.Tensor, k: int) -> torch.Tensor:
        """Embeddings (B, l, Z) of codes of scale k."""
        return self.embedding(idx_Bl + k * self.vocab_size if self.unshared else idx_Bl)

    def embed(self, idx_Bl: torch.Tensor, size: tuple[int, int], k: int = 0) -> torch.Tensor:
        """Codes of scale k as an embedding map (B, Z, *size)."""
        return self.lookup(idx_Bl, k).transpose(1, 2).reshape(len(idx_Bl), self.Cvae, *size)

    def contribution(self, h_BZpp: torch.Tensor, k: int, num_scales: int, size: torch.Size) -> torch.Tensor:
        """What the embedding map of scale k adds to f_hat of `size`: phi_k(bicubic(h))."""
        if h_BZpp.shape[-2:] != size:
            h_BZpp = F.interpolate(h_BZpp, size=tuple(size), mode='bicubic')
        return self.quant_resi(h_BZpp, k, num_scales)

    def queries(self, rest_BZhw: torch.Tensor, size: tuple[int, int], is_last: bool) -> torch.Tensor:
        """(N, Z) what a scale of `size` quantises of the rest, in (image, row, column) order."""
        u_BZpp = rest_BZhw if is_last else F.interpolate(rest_BZhw, size=size, mode='area')
        return u_BZpp.permute(0, 2, 3, 1).reshape(-1, self.Cvae)

    def residual_scales(self, f_BZhw: torch.Tensor,
                        v_patch_nums: Sequence[Side] | None = None) -> Iterator[ScaleCode]:
        """Algorithm 1: quantise what is left of f at every scale, coarse to fine. No gradient reaches f."""
        sizes = as_sizes(v_patch_nums or self.v_patch_nums)
        full = f_BZhw.shape[-2:]
        assert sizes[-1] == tuple(full), \
            f'the last scale must have the size of the feature map {tuple(full)}, got {sizes[-1]}'
        rest_BZhw = f_BZhw.detach()
        for k, size in enumerate(sizes):
            # r_k: the rest, averaged to the side of the scale, and the code next to each of its vectors.
            query_NZ = self.queries(rest_BZhw, size, is_last=k == len(sizes) - 1)
            idx_Bl = self.nearest_code(query_NZ, k).view(len(f_BZhw), -1)
            # phi_k(z_k): what these codes say of the full map, which is then taken off the rest.
            h_BZhw = self.contribution(self.embed(idx_Bl, size, k), k, len(sizes), full)
            yield ScaleCode(k, query_NZ, idx_Bl.view(-1, *size), h_BZhw, rest_BZhw)
            rest_BZhw = rest_BZhw - h_BZhw.detach()

    # ------------------------------------------------------------------------------ training
    @property
    def waiting(self) -> bool:
        """Whether quantisation is still deferred."""
        return self.steps_waited < self.measures.defer_steps

    def forward(self, f_BChw: torch.Tensor, ret_usages: bool = False,
                ) -> tuple[torch.Tensor, list[float] | None, torch.Tensor]:
        """The published form of `quantised`: (f_hat, usage in percent per scale or None, loss)."""
        out = self.quantised(f_BChw)
        return out.f_hat_BZhw, self.usages() if ret_usages else None, out.loss

    def quantised(self, f_BZhw: torch.Tensor) -> Quantised:
        """Quantise with gradients, in float32 (or float64) whatever autocast says.

        The loss is the mean over scales of mse(f_hat_k, f) for codes and phi plus beta times the same for f.
        """
        with torch.autocast(f_BZhw.device.type, enabled=False):
            f_BZhw = at_least_float32(f_BZhw)
            self.num_positions = f_BZhw[:, 0].numel()
            latent = dict(latent_mean=f_BZhw.detach().mean(), latent_std=f_BZhw.detach().std())
            if self.waiting and self.training:
                self._features.append(f_BZhw.detach())
                return Quantised(f_BZhw, f_BZhw.new_zeros(()), latent, {})
            out = self._quantised(f_BZhw)
            return out._replace(parts=latent | out.parts)

    def _quantised(self, f_BZhw: torch.Tensor) -> Quantised:
        measures = self.measures
        num_scales = len(self.v_patch_nums)
        f_hat = torch.zeros_like(f_BZhw)
        code_loss = 0.
        commitment = 0.
        entropy = 0.
        codes = {}
        queries = {}
        parts = {}

        # Scale dropout: some images keep their leading scales alone, so that these learn to stand for
        # themselves.
        dropping = self.training and measures.scale_drop > 0
        weight_BK = self._kept_scales(f_BZhw) if dropping else None
        for scale in self.residual_scales(f_BZhw):
            name = scale_name(scale.idx_Bhw.shape[1:])
            codes[name] = scale.idx_Bhw.flatten(1)
            queries[name] = scale.query_NZ
            parts[f'residual_{name}'] = scale.rest_BZhw.square().mean().sqrt()
            if measures.entropy and self.training:
                entropy = entropy + self._entropy(f_BZhw - f_BZhw.detach() + scale.rest_BZhw, scale)
            # After every scale, codes and phi move the sum so far towards f, and f is held to the sum.
            weight_B = None
            h_BZhw = scale.h_BZhw
            if dropping:
                weight_B = weight_BK[:, scale.k]
                h_BZhw = h_BZhw * (weight_B > 0).view(-1, 1, 1, 1)
            f_hat = f_hat + h_BZhw
            code_loss = code_loss + weighted_mse(f_hat, f_BZhw.detach(), weight_B)
            commitment = commitment + weighted_mse(f_hat.detach(), f_BZhw, weight_B)
        code_loss = code_loss / num_scales
        commitment = self.beta * commitment / num_scales
        parts |= dict(residual_end=(scale.rest_BZhw - scale.h_BZhw).detach().square().mean().sqrt(),
                      code_loss=code_loss.detach(), commitment=commitment.detach())
        loss = code_loss + commitment
        if measures.entropy and self.training:
            parts['entropy_loss'] = entropy.detach() / num_scales
            loss = loss + measures.entropy * entropy / num_scales

        # Hits of all ranks, for the running averages; with upkeeps they are counted after the step.
        if self.training and not self.upkeeps:
            hit_KV = torch.stack([torch.bincount(idx_Bl.flatten(), minlength=self.vocab_size)
                                  for idx_Bl in codes.values()]).float()
            dist.allreduce(hit_KV)
            self._record(hit_KV)
        if self.training:
            for upkeep, names in self._looked_after(codes):
                upkeep.observe({name: codes[name] for name in names},
                               {name: queries[name] for name in names})

        # The decoder sees f_hat, the encoder gets its gradient: straight through, or rotated (arXiv
        # 2410.06424).
        if measures.rotation:
            passed = rotated(f_BZhw, f_hat.detach())
        else:
            passed = (f_hat - f_BZhw).detach() + f_BZhw
        return Quantised(passed, loss, parts, codes)

    def _kept_scales(self, f_BZhw: torch.Tensor) -> torch.Tensor:
        """Weights (B, K) of the loss terms under scale dropout: 0 where a scale is dropped, mean 1 per scale.

        A dropped image keeps scales 1..n, n uniform in [max(1, 0.3 K), K]. Mean over the global batch.
        """
        num_scales = len(self.v_patch_nums)
        fewest = max(1, round(MIN_KEPT_SHARE * num_scales))

        def draw(u_B: torch.Tensor) -> torch.Tensor:
            num_kept_B = torch.randint(fewest, num_scales + 1, u_B.shape, device=u_B.device)
            num_kept_B[u_B.uniform_() >= self.measures.scale_drop] = num_scales
            kept_BK = torch.arange(num_scales, device=u_B.device) < num_kept_B[:, None]
            return kept_BK * (len(u_B) / kept_BK.sum(0).clamp_min(1))

        return draw_rows(len(f_BZhw), f_BZhw.device, draw)

    def _entropy(self, rest_BZhw: torch.Tensor, scale: ScaleCode) -> torch.Tensor:
        """Mean entropy of the soft assignments of a scale minus the entropy of their mean."""
        u_BZpp = F.interpolate(rest_BZhw, size=scale.idx_Bhw.shape[1:], mode='area')
        query_NZ = u_BZpp.permute(0, 2, 3, 1).flatten(0, 2)
        table_VZ = self.embedding.weight[self.rows(scale.k)]
        log_p_NV = F.log_softmax(-squared_distances(query_NZ, table_VZ) / ENTROPY_TEMPERATURE, dim=1)
        mean_V = log_p_NV.exp().mean(0)
        return (mean_V * (mean_V + 1e-9).log()).sum() - (log_p_NV.exp() * log_p_NV).sum(1).mean()

    def _looked_after(self, codes: dict[str, torch.Tensor]) -> list[tuple[CodebookUpkeep, list[str]]]:
        """Every upkeep with the names of its scales: one for all, or one each where unshared."""
        names = list(codes)
        return list(zip(self.upkeeps, [[name] for name in names] if self.unshared else [names], strict=False))

    def after_step(self, progress: float) -> dict[nn.Parameter, torch.Tensor]:
        """Move and restart codes, or come closer to the start of quantisation; see `Trainable.after_step`."""
        # Quantisation is on: moving averages and restarts of the codebook.
        if not self.waiting:
            replaced = [rows for upkeep in self.upkeeps for rows in upkeep.update(progress).values()]
            if self.upkeeps and self.upkeeps[0].hit_KV is not None:
                self._record(torch.cat([upkeep.hit_KV for upkeep in self.upkeeps]))
            return {self.embedding.weight: torch.cat(replaced)} if replaced else {}

        # It is deferred: the last steps of the wait gather features of all ranks, as many as k-means needs.
        batch_BZhw = torch.cat(self._features)
        self._features.clear()
        self.steps_waited += 1
        images_per_step = len(batch_BZhw) * dist.get_world_size()
        wanted = max(4 * len(self.embedding.weight) // len(self.v_patch_nums), KMEANS_IMAGES)
        steps = min(-(-wanted // images_per_step), -(-self.measures.defer_steps // 2))
        if self.steps_waited > self.measures.defer_steps - steps:
            self.gathered.append(dist.allgather(batch_BZhw))
        if self.waiting:
            return {}

        # The wait is over: the codebook begins where the features are.
        self.place_codes(torch.cat(self.gathered))
        self.gathered.clear()
        return {self.embedding.weight: torch.arange(len(self.embedding.weight))}

    def forget_step(self) -> None:
        """See `Trainable.forget_step`."""
        self._features.clear()
        for upkeep in self.upkeeps:
            upkeep.forget()

    @torch.no_grad()
    def place_codes(self, f_BZhw: torch.Tensor) -> None:
        """Set the codebook by k-means, scale by scale on what the scales before leave of f.

        A shared codebook gives every scale V / K codes of its own, and the last one the remainder. The first
        rank decides.

        Args:
            f_BZhw: features of the same images on every rank.
        """
        num_scales = len(self.v_patch_nums)
        full = f_BZhw.shape[-2:]
        rest_BZhw = f_BZhw
        table_VZ = self.embedding.weight.data
        share = self.vocab_size // num_scales
        for k, size in enumerate(as_sizes(self.v_patch_nums) if dist.is_master() else ()):
            query_NZ = self.queries(rest_BZhw, size, is_last=k == num_scales - 1)
            first, last = (0, self.vocab_size) if self.unshared else (k * share, (k + 1) * share)
            codes_VZ = table_VZ[self.rows(k)][first:self.vocab_size if k == num_scales - 1 else last]
            codes_VZ.copy_(kmeans(query_NZ, len(codes_VZ)))
            chosen_NZ = codes_VZ[nearest(query_NZ, codes_VZ)]
            h_BZpp = chosen_NZ.view(len(f_BZhw), *size, self.Cvae).permute(0, 3, 1, 2)
            rest_BZhw = rest_BZhw - self.contribution(h_BZpp, k, num_scales, full)
        dist.broadcast(table_VZ, src_rank=0)
        for upkeep in self.upkeeps:
            upkeep.begin()

    def training_state(self) -> dict:
        """What a checkpoint keeps beside the weights."""
        return dict(record_hit=self.record_hit, steps_waited=self.steps_waited,
                    gathered=list(self.gathered), upkeeps=[upkeep.state_dict() for upkeep in self.upkeeps])

    def load_training_state(self, state: dict) -> None:
        """Inverse of `training_state`."""
        self.record_hit = state['record_hit']
        self.steps_waited = state['steps_waited']
        self.gathered = [f.to(self.embedding.weight.device) for f in state['gathered']]
        for upkeep, saved in zip(self.upkeeps, state['upkeeps'], strict=True):
            upkeep.load_state_dict(saved)

    @torch.no_grad()
    def _record(self, hit_KV: torch.Tensor) -> None:
        """Fold one step's hits of all ranks into the running averages; the first step is taken as it is."""
        decay = 0. if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
        self.ema_vocab_hit_SV.mul_(decay).add_(hit_KV, alpha=1 - decay)
        self.record_hit += 1

    def usages(self) -> list[float]:
        """Percent of codes per scale hit at least 0.08 times as often as an even use of one full map would.

        As published, coarse scales cannot reach 100: side p tops out at p^2 / (0.08 h w) of the codebook.
        """
        margin = dist.get_world_size() * self.num_positions / self.vocab_size * 0.08
        return (self.ema_vocab_hit_SV >= margin).float().mean(1).mul(100).tolist()

    # ------------------------------------------------------------------------------ codes <-> features
    @torch.no_grad()
    def f_to_idxBl_or_fhat(self, f_BChw: torch.Tensor, to_fhat: bool,
                           v_patch_nums: Sequence[Side] | None = None) -> list[torch.Tensor]:
        """Per scale, coarse to fine: codes (B, ph * pw) int64, or f_hat so far (B, Z, h, w) if `to_fhat`."""
        f_hat = torch.zeros_like(f_BChw)
        out = []
        for scale in self.residual_scales(f_BChw, v_patch_nums):
            f_hat = f_hat + scale.h_BZhw
            out.append(f_hat if to_fhat else scale.idx_Bhw.flatten(1))
        return out

    @torch.no_grad()
    def embed_to_fhat(self, ms_h_BChw: list[torch.Tensor], all_to_max_scale: bool = True,
                      last_one: bool = False) -> list[torch.Tensor] | torch.Tensor:
        """Cumulative f_hat per scale (or the last one) from embedding maps (B, Z, pn, pn).

        With `all_to_max_scale` every f_hat has the finest size; without, f_hat k has the size of scale k.
        """
        num_scales = len(ms_h_BChw)
        full = ms_h_BChw[-1].shape[-2:]
        f_hat = torch.zeros_like(ms_h_BChw[-1 if all_to_max_scale else 0])
        out = []
        for k, h_BZpp in enumerate(ms_h_BChw):
            if not all_to_max_scale:
                full = h_BZpp.shape[-2:]
                f_hat = F.interpolate(f_hat, size=tuple(full), mode='bicubic')
            f_hat = f_hat + self.contribution(h_BZpp, k, num_scales, full)
            out.append(f_hat)
        return out[-1] if last_one else out

    # ------------------------------------------------------------------------------ for the generator
    @torch.no_grad()
    def idxBl_to_var_input(self, gt_ms_idx_Bl: list[torch.Tensor]) -> torch.Tensor | None:
        """Teacher-forcing input for every scale but the first.

        Args:
            gt_ms_idx_Bl: codes of the leading n scales, each (B, pn ** 2); n < K in progressive training.
        Returns:
            (B, tokens of scales 1..n-1, Z) float32: f_hat so far, resized to the next scale; None if n is 1.
        Source: arXiv 2404.02905, Algorithm 2.
        """
        pns = self.v_patch_nums
        num_scales = len(self.v_patch_nums)
        f_hat = 0.
        inputs = []
        for k, idx_Bl in enumerate(gt_ms_idx_Bl[:num_scales - 1]):
            if k + 1 == len(gt_ms_idx_Bl):
                break
            h = self.embed(idx_Bl, (pns[k], pns[k]), k)
            f_hat = f_hat + self.contribution(h, k, num_scales, torch.Size((pns[-1], pns[-1])))
            next_input = F.interpolate(f_hat, size=(pns[k + 1], pns[k + 1]), mode='area')
            inputs.append(next_input.flatten(2).transpose(1, 2))
        return torch.cat(inputs, dim=1) if inputs else None

    @torch.no_grad()
    def get_next_autoregressive_input(self, si: int, SN: int, f_hat: torch.Tensor,
                                      h_BChw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add scale si of SN to f_hat, in place; returns it and its area-resized copy for the next scale."""
        f_hat.add_(self.contribution(h_BChw, si, SN, f_hat.shape[-2:]))
        if si == SN - 1:
            return f_hat, f_hat
        pn = self.v_patch_nums[si + 1]
        return f_hat, F.interpolate(f_hat, size=(pn, pn), mode='area')
