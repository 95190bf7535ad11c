"""Multi-scale residual quantizer: an image feature as K coarse-to-fine maps of codes that sum up to it.

This file is the published algorithm; what keeps its training from collapse is in `quantizer_training`.

Letters: B batch, K scales, Z code channels, V vocabulary, N all queries of a scale, h w feature map.
Source: arXiv 2404.02905, Algorithms 1 and 2; upstream's class VectorQuantizer2.
"""
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import dist
from models.base import at_least_float32
from models.precision import float32_matmul
from models.scales import Side, as_sizes, scale_name
from models.tokenizers.codebook import squared_distances

if TYPE_CHECKING:
    from models.tokenizers.quantizer_training import QuantizerTraining


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


class ScaleCode(NamedTuple):
    """One step of the residual loop."""
    k: int
    query_NZ: torch.Tensor   # what was quantised, N = B * ph * pw in (image, row, column) order
    idx_Bhw: torch.Tensor    # its codes, int64
    h_BZhw: torch.Tensor     # their contribution to f_hat, at full size
    residual_BZhw: torch.Tensor  # what was left before

    @property
    def name(self) -> str:
        """Rows x columns of the code map, such as '16x16'."""
        return scale_name(self.idx_Bhw.shape[1:])


class Quantised(NamedTuple):
    """Outcome of quantising with gradients."""
    f_hat_BZhw: torch.Tensor           # for the decoder; its gradient goes to f, not to codes or phi
    loss: torch.Tensor
    parts: dict[str, torch.Tensor]     # detached scalars worth logging
    codes: dict[str, torch.Tensor]     # (B, l) int64 by scale; empty before the codebook has started


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
    Attributes:
        measures: what keeps training from collapse; None is the published training, by gradient alone.
    """

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[Side] | None = None,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        unshared: bool = False,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.Cvae = Cvae
        self.using_znorm = using_znorm
        self.beta = beta
        self.v_patch_nums = tuple(v_patch_nums)
        num_scales = len(self.v_patch_nums)
        self.quant_resi = PhiBank(Cvae, quant_resi, share_quant_resi, default_qresi_counts or num_scales)
        # Short pyramids leave some of the convolutions out, and DDP would wait for their gradients.
        used = {phi_index(len(self.quant_resi.phis), k, num_scales) for k in range(num_scales)}
        for i, phi in enumerate(self.quant_resi.phis):
            phi.requires_grad_(i in used)
        self.register_buffer('ema_vocab_hit_SV', torch.zeros(num_scales, vocab_size))
        self.record_hit = 0  # updates of the averages in ema_vocab_hit_SV so far
        self.num_positions = 0  # B * h * w of the last step on this rank
        self.unshared = unshared
        num_codebooks = num_scales if unshared else 1
        self.embedding = nn.Embedding(vocab_size * num_codebooks, Cvae)
        self.measures: QuantizerTraining | None = None

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

    def queries(self, residual_BZhw: torch.Tensor, size: tuple[int, int], is_last: bool) -> torch.Tensor:
        """(N, Z) what a scale of `size` quantises of the rest, in (image, row, column) order."""
        u_BZpp = residual_BZhw if is_last else F.interpolate(residual_BZhw, size=size, mode='area')
        return u_BZpp.permute(0, 2, 3, 1).reshape(-1, self.Cvae)

    def residual_scales(self, f_BZhw: torch.Tensor,
                        v_patch_nums: Sequence[Side] | None = None) -> Iterator[ScaleCode]:
        """Algorithm 1: quantise what is left of f at every scale, coarse to fine. No gradient reaches f."""
        sizes = as_sizes(v_patch_nums or self.v_patch_nums)
        full = f_BZhw.shape[-2:]
        assert sizes[-1] == tuple(full), \
            f'the last scale must have the size of the feature map {tuple(full)}, got {sizes[-1]}'
        residual_BZhw = f_BZhw.detach()
        for k, size in enumerate(sizes):
            # r_k: the residual, averaged to the side of the scale, and the nearest code of each vector.
            query_NZ = self.queries(residual_BZhw, size, is_last=k == len(sizes) - 1)
            idx_Bl = self.nearest_code(query_NZ, k).view(len(f_BZhw), -1)
            # phi_k(z_k): what these codes say of the full map, which is then taken off the rest.
            h_BZhw = self.contribution(self.embed(idx_Bl, size, k), k, len(sizes), full)
            yield ScaleCode(k, query_NZ, idx_Bl.view(-1, *size), h_BZhw, residual_BZhw)
            residual_BZhw = residual_BZhw - h_BZhw.detach()

    # ------------------------------------------------------------------------------ training
    def forward(self, f_BChw: torch.Tensor, ret_usages: bool = False,
                ) -> tuple[torch.Tensor, list[float] | None, torch.Tensor]:
        """The published form of `quantised`: (f_hat, usage in percent per scale or None, loss)."""
        out = self.quantised(f_BChw)
        return out.f_hat_BZhw, self.usages() if ret_usages else None, out.loss

    def quantised(self, f_BZhw: torch.Tensor) -> Quantised:
        """Quantise with gradients, in float32 (or float64) whatever autocast says.

        The loss is the mean over scales of mse(f_hat_k, sg(f)) + beta mse(sg(f_hat_k), f), where sg stops
        the gradient: the first term moves codes and phi, the second one holds the encoder to them.
        """
        with torch.autocast(f_BZhw.device.type, enabled=False):
            f_BZhw = at_least_float32(f_BZhw)
            self.num_positions = f_BZhw[:, 0].numel()
            if self.measures is None:
                out = self._quantised(f_BZhw)
            else:
                out = self.measures.quantised(f_BZhw)
            latent = dict(latent_mean=f_BZhw.detach().mean(), latent_std=f_BZhw.detach().std())
            return out._replace(parts=latent | out.parts)

    def _quantised(self, f_BZhw: torch.Tensor) -> Quantised:
        """The published training."""
        out, _ = self.quantise_scales(f_BZhw)
        if self.training:
            self.record_hits(out.codes)
        # Straight through: the decoder sees f_hat, and its gradient goes to the encoder unchanged.
        return out._replace(f_hat_BZhw=(out.f_hat_BZhw - f_BZhw).detach() + f_BZhw)

    def quantise_scales(self, f_BZhw: torch.Tensor, weight_BK: torch.Tensor | None = None,
                        ) -> tuple[Quantised, list[ScaleCode]]:
        """Algorithm 1 with its losses; f_hat has the gradients of codes and phi.

        Args:
            weight_BK: weight of every image in the loss of every scale; scales of weight 0 are left out of
                the sum f_hat, too. None means that all count the same.
        """
        num_scales = len(self.v_patch_nums)
        f_hat = torch.zeros_like(f_BZhw)
        code_loss = 0.
        commitment = 0.
        codes = {}
        parts = {}
        scales = []
        for scale in self.residual_scales(f_BZhw):
            scales.append(scale)
            codes[scale.name] = scale.idx_Bhw.flatten(1)
            parts[f'residual_{scale.name}'] = scale.residual_BZhw.square().mean().sqrt()
            weight_B = None
            h_BZhw = scale.h_BZhw
            if weight_BK is not None:
                weight_B = weight_BK[:, scale.k]
                h_BZhw = h_BZhw * (weight_B > 0).view(-1, 1, 1, 1)
            # After every scale, codes and phi move the sum so far towards f, and f is held to the sum.
            f_hat = f_hat + h_BZhw
            code_loss = code_loss + weighted_mse(f_hat, f_BZhw.detach(), weight_B)
            commitment = commitment + weighted_mse(f_hat.detach(), f_BZhw, weight_B)
        code_loss = code_loss / num_scales
        commitment = self.beta * commitment / num_scales

        end_BZhw = (scale.residual_BZhw - scale.h_BZhw).detach()  # what all scales together leave of f
        parts |= dict(residual_end=end_BZhw.square().mean().sqrt(),
                      code_loss=code_loss.detach(), commitment=commitment.detach())
        return Quantised(f_hat, code_loss + commitment, parts, codes), scales

    def record_hits(self, codes: dict[str, torch.Tensor]) -> None:
        """Count the codes (B, l) of all ranks, by scale, for `usages`."""
        hits = [torch.bincount(idx_Bl.flatten(), minlength=self.vocab_size) for idx_Bl in codes.values()]
        hit_KV = torch.stack(hits).float()
        dist.allreduce(hit_KV)
        self.average_hits(hit_KV)

    @torch.no_grad()
    def average_hits(self, hit_KV: torch.Tensor) -> None:
        """Fold the hits of a step on all ranks into the running averages, which begin with the first step."""
        if self.record_hit == 0:
            decay = 0.
        elif self.record_hit < 100:
            decay = 0.9
        else:
            decay = 0.99
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
