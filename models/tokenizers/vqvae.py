"""VQVAE: the multi-scale residual image tokenizer of VAR.

An image becomes K code maps of growing size: each one describes what the sum of the coarser ones leaves over.
Letters: B batch, K scales, l tokens of one scale, Z code channels, V vocabulary, h w feature map, 3HW image.
Source: arXiv 2404.02905, Sec. 3.2; what keeps its training from collapse is in quantizer_training.py.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.base import Reconstruction, Tokenizer, at_least_float32
from models.scales import ScaleLayout, Side, as_sizes, scale_name
from models.tokenizers.codebook import CodebookUpkeep
from models.tokenizers.conv import (
    build_encoder_decoder,
    in_float32,
    init_convolutions,
    read_encoder_decoder,
    start_as_identity,
)
from models.tokenizers.quantize import VectorQuantizer2
from models.tokenizers.quantizer_training import QuantizerTraining


class VQVAE(Tokenizer):
    """Encoder, quantizer with K code maps, decoder.

    Args:
        vocab_size: V.
        z_channels: Z.
        ch: channels of the first level, a multiple of 32; published weights use 160.
        dropout: probability inside residual blocks, in [0, 1).
        beta: weight of the commitment term.
        using_znorm, quant_resi, share_quant_resi, default_qresi_counts: see `VectorQuantizer2`.
        quant_conv_ks: kernel of the convolutions before and after the quantizer.
        v_patch_nums: sides of the K code maps, coarse to fine; the last one is image side / stride.
        test_mode: eval mode with every parameter frozen, as a generator uses it.
        ch_mult: channels of each level as a multiple of `ch`; the stride is 2 ** (levels - 1).
        num_res_blocks: residual blocks per encoder level; each decoder level has one more.
        net: 'published' or 'tiny', see `build_encoder_decoder`.
        unshared: see `VectorQuantizer2`.
        measures: arguments of `QuantizerTraining`; None trains as published, by gradient alone.
    """

    built_settings = ('v_patch_nums', 'using_znorm')
    headline = {'rec': 'rec_loss', 'lat': 'latent_loss', 'psnr': 'psnr', 'use': 'usage'}
    legend = ('rec is the loss of the reconstruction, lat that of the codes, psnr the PSNR of the '
              'reconstruction in dB, use the share of the codebook that is used')

    def __init__(
        self,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 128,
        dropout: float = 0.,
        beta: float = 0.25,
        using_znorm: bool = False,
        quant_conv_ks: int = 3,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[Side] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        test_mode: bool = True,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        net: str = 'published',
        unshared: bool = False,
        measures: dict[str, Any] | None = None,
    ):
        super().__init__()
        # Upstream names stand beside ours, since notebooks read them.
        self.V = self.vocab_size = vocab_size
        self.Cvae = self.channels = z_channels
        self.test_mode = test_mode

        # 1. encoder and decoder
        self.encoder, self.decoder = build_encoder_decoder(
            net, ch=ch, ch_mult=tuple(ch_mult), num_res_blocks=num_res_blocks, dropout=dropout,
            z_channels=z_channels)
        self.downsample = self.stride = self.encoder.stride

        # 2. quantizer, between two convolutions
        self.quantize = VectorQuantizer2(vocab_size, z_channels, using_znorm, beta, default_qresi_counts,
                                         v_patch_nums, quant_resi, share_quant_resi, unshared)
        if measures is not None:
            self.quantize.measures = QuantizerTraining(self.quantize, **measures)
        padding = quant_conv_ks // 2
        self.quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=padding)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=padding)

        # 3. weights
        self.init_weights()
        if test_mode:
            self.eval().requires_grad_(False)

    def init_weights(self, codebook_init: str = 'uniform') -> None:
        """Set all weights, since a caller may have switched off the layers' own `reset_parameters`.

        Args:
            codebook_init: distribution of the codes. 'uniform': within 1 / (36 sqrt(Z)) of 0; 'inv_v':
                uniform within 1 / V of 0; 'normal': N(0, 1), torch's default, which leaves nearly all codes
                without a single use.
        """
        init_convolutions(self)
        start_as_identity(self.quant_conv, self.post_quant_conv)
        weight = self.quantize.embedding.weight
        if codebook_init == 'normal':
            nn.init.normal_(weight)
        else:
            bound = self.channels ** -0.5 / 36
            if codebook_init == 'inv_v':
                bound = 1 / self.vocab_size
            nn.init.uniform_(weight, -bound, bound)

    # ------------------------------------------------------------------------------ inference
    def features(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Feature map (B, Z, h, w) that the quantizer takes, never in half precision."""
        h_BZhw = self.encoder(images_B3HW)                                                 # (B, Z, h, w)
        return in_float32(self.quant_conv, h_BZhw)                                         # (B, Z, h, w)

    def pixels(self, f_hat_BZhw: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) of a feature map, not clamped and never in half precision."""
        h_BZhw = in_float32(self.post_quant_conv, f_hat_BZhw)                              # (B, Z, h, w)
        return at_least_float32(self.decoder(h_BZhw))                                      # (B, 3, H, W)

    @torch.no_grad()
    def fhat_to_img(self, f_hat: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] of a feature map (B, Z, h, w)."""
        return self.pixels(f_hat).clamp_(-1, 1)

    def _encode(self, images_B3HW: torch.Tensor,
                v_patch_nums: Sequence[Side] | None = None) -> list[torch.Tensor]:
        return self.quantize.f_to_idxBl_or_fhat(self.features(images_B3HW), to_fhat=False,
                                                v_patch_nums=v_patch_nums)

    def precompute(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The codes (B, L) of all scales, coarse to fine: 680 of them at 256 pixels, 1,360 bytes."""
        return torch.cat(self.encode(images_B3HW), dim=1)

    def _unpack(self, idx_BL: torch.Tensor) -> list[torch.Tensor]:
        layout = ScaleLayout(self.quantize.v_patch_nums)
        return list(idx_BL.split(layout.lengths, dim=1))

    def decode(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] of the codes (B, l) of all scales, coarse to fine."""
        return self.idxBl_to_img(tokens, same_shape=True, last_one=True)

    def img_to_idxBl(self, inp_img_no_grad: torch.Tensor,
                     v_patch_nums: Sequence[Side] | None = None) -> list[torch.Tensor]:
        """Codes of images (B, 3, H, W) in [-1, 1], as `encode` returns them.

        Args:
            v_patch_nums: sides of the code maps; None takes those of the constructor.
        Returns:
            K tensors (B, rows * columns), int64 in [0, V), coarse to fine; a map is in row-major order.
        """
        return self.encode(inp_img_no_grad, v_patch_nums)

    @torch.no_grad()
    def idxBl_to_img(self, ms_idx_Bl: list[torch.Tensor], same_shape: bool,
                     last_one: bool = False) -> list[torch.Tensor] | torch.Tensor:
        """Images in [-1, 1] of the codes of all scales, decoded after each scale.

        Args:
            ms_idx_Bl: codes (B, l) of square code maps, coarse to fine.
            same_shape: True decodes all images at full size, False image k at the size of scale k.
            last_one: return the image after the last scale alone.
        Returns:
            One image batch per scale, coarse to fine, or a single one.
        """
        sides = [round(idx_Bl.shape[1] ** 0.5) for idx_Bl in ms_idx_Bl]
        ms_h_BZhw = []
        for k, (idx_Bl, side) in enumerate(zip(ms_idx_Bl, sides, strict=True)):
            ms_h_BZhw.append(self.quantize.embed(idx_Bl, (side, side), k))
        return self.embed_to_img(ms_h_BZhw, all_to_max_scale=same_shape, last_one=last_one)

    def embed_to_img(self, ms_h_BChw: list[torch.Tensor], all_to_max_scale: bool,
                     last_one: bool = False) -> list[torch.Tensor] | torch.Tensor:
        """As `idxBl_to_img`, from embedded code maps (B, Z, side, side) in place of codes."""
        f_hat = self.quantize.embed_to_fhat(ms_h_BChw, all_to_max_scale=all_to_max_scale, last_one=last_one)
        if last_one:
            return self.fhat_to_img(f_hat)
        return [self.fhat_to_img(f) for f in f_hat]

    @torch.no_grad()
    def img_to_reconstructed_img(self, x: torch.Tensor, v_patch_nums: Sequence[Side] | None = None,
                                 last_one: bool = False) -> list[torch.Tensor] | torch.Tensor:
        """Reconstructions of images (B, 3, H, W), all in [-1, 1], after each scale or after the last."""
        f_hats = self.quantize.f_to_idxBl_or_fhat(self.features(x), to_fhat=True, v_patch_nums=v_patch_nums)
        if last_one:
            return self.fhat_to_img(f_hats[-1])
        return [self.fhat_to_img(f) for f in f_hats]

    def progressive(self, images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = as_sizes(self.quantize.v_patch_nums)
        images = self.img_to_reconstructed_img(images_B3HW)
        return {scale_name(size): image for size, image in zip(sizes, images, strict=True)}

    # ------------------------------------------------------------------------------ training
    def forward(self, inp: torch.Tensor, ret_usages: bool = False,
                ) -> tuple[torch.Tensor, list[float] | None, torch.Tensor]:
        """Published training pass over images (B, 3, H, W) in [-1, 1].

        Args:
            ret_usages: also return how many of the codes are in use.
        Returns:
            reconstruction: (B, 3, H, W), not clamped.
            usages: percent of the codes in use, for each scale; None unless asked for.
            vq_loss: scalar, commitment and codebook terms.
        """
        f_BZhw = self.features(inp)                                                        # (B, Z, h, w)
        f_hat, usages, vq_loss = self.quantize(f_BZhw, ret_usages=ret_usages)              # (B, Z, h, w)
        return self.pixels(f_hat), usages, vq_loss                                         # (B, 3, H, W)

    def reconstruct(self, images_B3HW: torch.Tensor, progress: float = 1.) -> Reconstruction:
        self.check_size(images_B3HW)
        out = self.quantize.quantised(self.features(images_B3HW))
        rec_B3HW = self.pixels(out.f_hat_BZhw)
        return Reconstruction([(images_B3HW, rec_B3HW)], out.loss, out.parts, out.codes)

    @property
    def fixed_image_size(self) -> int:
        """The pyramid of code maps ends at the size of the feature map."""
        return self.quantize.v_patch_nums[-1] * self.stride

    @property
    def has_idle_parameters(self) -> bool:
        """True until quantisation starts: the codes and the convolutions phi have no gradient before."""
        measures = self.quantize.measures
        return measures is not None and measures.waiting

    def after_step(self, progress: float) -> dict[nn.Parameter, torch.Tensor]:
        measures = self.quantize.measures
        return {} if measures is None else measures.after_step(progress)

    def forget_step(self) -> None:
        if self.quantize.measures is not None:
            self.quantize.measures.forget_step()

    @property
    def upkeeps(self) -> list[CodebookUpkeep]:
        """Of the codebooks; there are none in the published training."""
        return self.quantize.measures.upkeeps if self.quantize.measures is not None else []

    def code_metrics(self) -> dict[str, float]:
        """How the codes are used, over all codebooks; figures over all scales need a single codebook."""
        metrics: dict[str, float] = {}
        for upkeep in self.upkeeps:
            own = upkeep.metrics()
            # Restarts of several codebooks are added up, and an alarm of any of them is an alarm.
            own['restarts'] = own['restarts'] + metrics.get('restarts', 0.)
            own['alarm_collapse'] = max(own['alarm_collapse'], metrics.get('alarm_collapse', 0.))
            metrics |= own

        # Each scale has a codebook of its own: what the last one wrote is not true of all of them.
        if self.quantize.unshared:
            for name in ('usage', 'perplexity', 'distinct', 'dead'):
                metrics.pop(name, None)

        # The published figure, beside ours, for comparisons with published logs.
        for name, percent in zip(self.code_counts(), self.quantize.usages(), strict=False):
            metrics[f'usage_legacy_{name}'] = percent
        return metrics

    def code_counts(self) -> dict[str, torch.Tensor]:
        counts = {}
        for upkeep in self.upkeeps:
            counts |= upkeep.counts()
        return counts

    def no_weight_decay(self) -> set[str]:
        return {'quantize.embedding'}

    def config_state(self, progress: float) -> dict[str, Any]:
        return dict(v_patch_nums=list(self.quantize.v_patch_nums), using_znorm=self.quantize.using_znorm)

    def exported(self, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The flat published layout, unless settings were used that it has no place for."""
        as_published = not self.quantize.using_znorm and not self.quantize.unshared
        if as_published:
            return dict(state)
        return super().exported(state)

    def training_state(self) -> dict[str, Any]:
        quantize = self.quantize
        unused = dict(steps_waited=0, gathered=[], upkeeps=[])
        measures = unused if quantize.measures is None else quantize.measures.state_dict()
        return dict(record_hit=quantize.record_hit, **measures)

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Inverse of `training_state`.

        Raises:
            ValueError: the state has measures against collapse that this training lacks.
        """
        self.quantize.record_hit = state['record_hit']
        if self.quantize.measures is not None:
            self.quantize.measures.load_state_dict(state)
        elif state['upkeeps'] or state['gathered']:
            raise ValueError('expected the state of a training by gradient alone, got one with upkeep of the '
                             'codes: pass the same measures')

    # ------------------------------------------------------------------------------ weights
    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As in torch, except that usage counters for another number of scales are left out.

        The dictionary that is passed in does not change.
        """
        key = 'quantize.ema_vocab_hit_SV'
        mine = self.quantize.ema_vocab_hit_SV
        if key in state_dict and len(state_dict[key]) != len(mine):
            state_dict = {**state_dict, key: mine}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """All constructor arguments that shape the network; the sides of the code maps do not."""
        num_codes, z_channels = state['quantize.embedding.weight'].shape
        vocab_size = state['quantize.ema_vocab_hit_SV'].shape[1]

        # phi: a list of convolutions, a single one that all scales share, or (0) one for every scale
        num_phi = 0
        for key in state:
            if key.startswith('quantize.quant_resi.qresi_ls.') and key.endswith('.weight'):
                num_phi += 1
        if num_phi == 0 and 'quantize.quant_resi.qresi.weight' in state:
            num_phi = 1

        return read_encoder_decoder(state) | dict(
            vocab_size=vocab_size,
            z_channels=z_channels,
            unshared=num_codes != vocab_size,
            quant_conv_ks=state['quant_conv.weight'].shape[-1],
            share_quant_resi=num_phi,
        )
