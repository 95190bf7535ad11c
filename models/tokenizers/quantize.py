"""Multi-scale residual quantizer: an image feature as K coarse-to-fine maps of codes that sum up to it.

Letters: B batch, K scales, Z code channels, V vocabulary, N all queries of a scale, h w feature map.
Source: arXiv 2404.02905, Algorithms 1 and 2; upstream's class VectorQuantizer2.
"""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import dist
from models.tokenizers.codebook import CodebookEMA

Side = int | tuple[int, int]


@contextmanager
def float32_matmul() -> Iterator[None]:
    """Full float32 products inside: near-equal distances must not be decided by TF32's 10 bits."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


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


class ScaleCode(NamedTuple):
    """One step of the residual loop."""
    k: int
    query_NZ: torch.Tensor  # what was quantised, N = B * ph * pw in (image, row, column) order
    idx_Bhw: torch.Tensor   # its codes, int64
    h_BZhw: torch.Tensor    # their contribution to f_hat, at full size


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
        codebook: 'grad' trains it by gradient as published, 'ema' by moving averages, as training here does.
    """

    def __init__(self, vocab_size: int, Cvae: int, using_znorm: bool, beta: float = 0.25,
                 default_qresi_counts: int = 0, v_patch_nums: Sequence[Side] | None = None,
                 quant_resi: float = 0.5, share_quant_resi: int = 4, codebook: str = 'grad'):
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.beta = vocab_size, Cvae, using_znorm, beta
        self.v_patch_nums = tuple(v_patch_nums)
        self.quant_resi = PhiBank(Cvae, quant_resi, share_quant_resi,
                                  default_qresi_counts or len(self.v_patch_nums))
        used = {phi_index(len(self.quant_resi.phis), k, len(self.v_patch_nums))
                for k in range(len(self.v_patch_nums))}
        for i, phi in enumerate(self.quant_resi.phis):
            phi.requires_grad_(i in used)  # short pyramids leave some out, and DDP waits for every gradient
        self.register_buffer('ema_vocab_hit_SV', torch.zeros(len(self.v_patch_nums), vocab_size))
        self.record_hit = 0  # training steps that the averages in ema_vocab_hit_SV have seen
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.codebook = CodebookEMA(self.embedding) if codebook == 'ema' else None

    def eini(self, eini: float) -> None:
        """Initialise the codebook: e > 0 truncated normal of std e, e < 0 uniform in +-|e| / V."""
        if eini > 0:
            nn.init.trunc_normal_(self.embedding.weight, std=eini)
        elif eini < 0:
            self.embedding.weight.data.uniform_(-abs(eini) / self.vocab_size, abs(eini) / self.vocab_size)

    # ------------------------------------------------------------------------------ the algorithm, once
    @torch.no_grad()
    def nearest_code(self, query_NZ: torch.Tensor) -> torch.Tensor:
        """(N,) int64 index of the closest code; the first one on ties."""
        table_VZ = self.embedding.weight
        with float32_matmul():
            if self.using_znorm:
                return (F.normalize(query_NZ, dim=-1) @ F.normalize(table_VZ, dim=-1).T).argmax(1)
            distance_NV = query_NZ.square().sum(1, keepdim=True) + table_VZ.square().sum(1)
            return distance_NV.addmm_(query_NZ, table_VZ.T, alpha=-2, beta=1).argmin(1)

    def embed(self, idx_Bl: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Codes as an embedding map (B, Z, *size)."""
        return self.embedding(idx_Bl).transpose(1, 2).reshape(len(idx_Bl), self.Cvae, *size)

    def contribution(self, h_BZpp: torch.Tensor, k: int, num_scales: int, size: torch.Size) -> torch.Tensor:
        """What the embedding map of scale k adds to f_hat of `size`: phi_k(bicubic(h))."""
        if h_BZpp.shape[-2:] != size:
            h_BZpp = F.interpolate(h_BZpp, size=tuple(size), mode='bicubic')
        return self.quant_resi(h_BZpp, k, num_scales)

    def residual_scales(self, f_BZhw: torch.Tensor,
                        v_patch_nums: Sequence[Side] | None = None) -> Iterator[ScaleCode]:
        """Algorithm 1: quantise what is left of f at every scale, coarse to fine. No gradient reaches f."""
        sizes = [(s, s) if isinstance(s, int) else tuple(s) for s in v_patch_nums or self.v_patch_nums]
        full = f_BZhw.shape[-2:]
        assert sizes[-1] == tuple(full), \
            f'the last scale must have the size of the feature map {tuple(full)}, got {sizes[-1]}'
        rest_BZhw = f_BZhw.detach()
        for k, size in enumerate(sizes):
            u_BZpp = rest_BZhw if k == len(sizes) - 1 else F.interpolate(rest_BZhw, size=size, mode='area')
            query_NZ = u_BZpp.permute(0, 2, 3, 1).reshape(-1, self.Cvae)
            idx_Bl = self.nearest_code(query_NZ).view(len(f_BZhw), -1)
            h_BZhw = self.contribution(self.embed(idx_Bl, size), k, len(sizes), full)
            yield ScaleCode(k, query_NZ, idx_Bl.view(-1, *size), h_BZhw)
            rest_BZhw = rest_BZhw - h_BZhw.detach()

    # ------------------------------------------------------------------------------ training
    def forward(self, f_BChw: torch.Tensor, ret_usages: bool = False,
                ) -> tuple[torch.Tensor, list[float] | None, torch.Tensor]:
        """Quantise with gradients, in float32 whatever autocast says.

        Returns:
            f_hat (B, Z, h, w), straight-through: its gradient goes to f unchanged and not to codes or phi;
            usage in percent per scale (see `usages`) or None;
            loss, the mean over scales of mse(f_hat_k, f) for codes and phi plus beta times the same for f.
        """
        with torch.autocast(f_BChw.device.type, enabled=False):
            f_BChw = f_BChw.float()
            f_hat, loss, hits = torch.zeros_like(f_BChw), 0., []
            queries, codes = [], []
            for scale in self.residual_scales(f_BChw):
                f_hat = f_hat + scale.h_BZhw
                loss = (loss + self.beta * F.mse_loss(f_hat.detach(), f_BChw)
                        + F.mse_loss(f_hat, f_BChw.detach()))
                queries.append(scale.query_NZ)
                codes.append(scale.idx_Bhw.flatten())
                hits.append(torch.bincount(codes[-1], minlength=self.vocab_size))
            if self.training:
                self._record(torch.stack(hits))
                if self.codebook is not None:
                    self.codebook.observe(queries, codes)
            usages = self.usages(f_BChw[:, 0].numel()) if ret_usages else None
            return (f_hat - f_BChw).detach() + f_BChw, usages, loss / len(self.v_patch_nums)

    @torch.no_grad()
    def _record(self, hit_KV: torch.Tensor) -> None:
        """Fold one step's hits of all ranks into the running averages; the first step is taken as it is."""
        hit_KV = hit_KV.float()
        dist.allreduce(hit_KV)
        decay = 0. if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
        self.ema_vocab_hit_SV.mul_(decay).add_(hit_KV, alpha=1 - decay)
        self.record_hit += 1

    def usages(self, num_positions: int) -> list[float]:
        """Percent of codes per scale hit at least 0.08 times as often as an even use of one full map would.

        As published, coarse scales cannot reach 100: side p tops out at p^2 / (0.08 h w) of the codebook.

        Args:
            num_positions: B * h * w of one step on one rank.
        """
        margin = dist.get_world_size() * num_positions / self.vocab_size * 0.08
        return (self.ema_vocab_hit_SV >= margin).float().mean(1).mul(100).tolist()

    # ------------------------------------------------------------------------------ codes <-> features
    @torch.no_grad()
    def f_to_idxBl_or_fhat(self, f_BChw: torch.Tensor, to_fhat: bool,
                           v_patch_nums: Sequence[Side] | None = None) -> list[torch.Tensor]:
        """Per scale, coarse to fine: codes (B, ph * pw) int64, or f_hat so far (B, Z, h, w) if `to_fhat`."""
        f_hat, out = torch.zeros_like(f_BChw), []
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
        num_scales, full = len(ms_h_BChw), ms_h_BChw[-1].shape[-2:]
        f_hat, out = torch.zeros_like(ms_h_BChw[-1 if all_to_max_scale else 0]), []
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
        pns, num_scales = self.v_patch_nums, len(self.v_patch_nums)
        f_hat, inputs = 0., []
        for k, idx_Bl in enumerate(gt_ms_idx_Bl[:num_scales - 1]):
            if k + 1 == len(gt_ms_idx_Bl):
                break
            h = self.embed(idx_Bl, (pns[k], pns[k]))
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
