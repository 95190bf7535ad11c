"""VQVAE: the multi-scale residual image tokenizer of VAR.

Letters: B batch, K scales, l tokens of one scale, Z code channels, V vocabulary, h w feature map, 3HW image.
Source: arXiv 2404.02905, Sec. 3.2; training after spec "tokenizer A": EMA codebook and dead-code restart.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.base import Tokenizer
from models.tokenizers.conv import Decoder, Encoder
from models.tokenizers.quantize import Side, VectorQuantizer2

L1_WEIGHT, L2_WEIGHT = 0.2, 1.0  # of the pixel loss; the quantizer loss has weight 1


class VQVAE(Tokenizer):
    """Encoder, quantizer with K code maps, decoder.

    Args:
        vocab_size: V. z_channels: Z.
        ch: width of the first level, a multiple of 32; published weights use 160.
        dropout: inside residual blocks. beta: weight of the commitment term.
        using_znorm, quant_resi, share_quant_resi, default_qresi_counts: see `VectorQuantizer2`.
        quant_conv_ks: kernel of the convolutions before and after the quantizer.
        v_patch_nums: sides of the K code maps, coarse to fine; the last one is image side / stride.
        test_mode: eval mode with every parameter frozen, as a generator uses it.
        ch_mult: width multiples per level; the stride is 2 ** (levels - 1).
        num_res_blocks: residual blocks per encoder level; the decoder has one more.
        codebook: 'grad' as published, or 'ema' (see `CodebookEMA`).
    """

    headline = {'rec': 'rec_loss', 'vq': 'vq_loss', 'psnr': 'psnr', 'use': 'usage_last'}
    selection = 'rec_loss'

    def __init__(self, vocab_size: int = 4096, z_channels: int = 32, ch: int = 128, dropout: float = 0.,
                 beta: float = 0.25, using_znorm: bool = False, quant_conv_ks: int = 3,
                 quant_resi: float = 0.5, share_quant_resi: int = 4, default_qresi_counts: int = 0,
                 v_patch_nums: Sequence[Side] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), test_mode: bool = True,
                 ch_mult: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2, codebook: str = 'grad'):
        super().__init__()
        self.V = self.vocab_size = vocab_size
        self.Cvae = self.channels = z_channels
        self.downsample = self.stride = 2 ** (len(ch_mult) - 1)
        self.test_mode = test_mode
        net = dict(ch=ch, ch_mult=tuple(ch_mult), num_res_blocks=num_res_blocks, dropout=dropout,
                   z_channels=z_channels)
        self.encoder, self.decoder = Encoder(**net), Decoder(**net)
        self.quantize = VectorQuantizer2(vocab_size, z_channels, using_znorm, beta, default_qresi_counts,
                                         v_patch_nums, quant_resi, share_quant_resi, codebook)
        self.quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        self.init_weights()
        if test_mode:
            self.eval().requires_grad_(False)

    def init_weights(self) -> None:
        """Sane values even where a caller switched off the layers' own `reset_parameters`.

        The codebook starts small and uniform: torch's N(0, 1) default would leave nearly all codes dead.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=5 ** 0.5)  # as torch's own default
                bound = module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.bias, -bound, bound)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        bound = self.channels ** -0.5 / 36
        nn.init.uniform_(self.quantize.embedding.weight, -bound, bound)

    # ------------------------------------------------------------------------------ inference
    def features(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, Z, h, w), what the quantizer sees."""
        return self.quant_conv(self.encoder(images_B3HW))

    @torch.no_grad()
    def fhat_to_img(self, f_hat: torch.Tensor) -> torch.Tensor:
        """Image in [-1, 1] of a feature map (B, Z, h, w)."""
        return self.decoder(self.post_quant_conv(f_hat)).clamp_(-1, 1)

    def _encode(self, images_B3HW: torch.Tensor,
                v_patch_nums: Sequence[Side] | None = None) -> list[torch.Tensor]:
        return self.quantize.f_to_idxBl_or_fhat(self.features(images_B3HW), to_fhat=False,
                                                v_patch_nums=v_patch_nums)

    def decode(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        """Image in [-1, 1] of the codes (B, l) of all scales."""
        return self.idxBl_to_img(tokens, same_shape=True, last_one=True)

    def img_to_idxBl(self, inp_img_no_grad: torch.Tensor,
                     v_patch_nums: Sequence[Side] | None = None) -> list[torch.Tensor]:
        """As `encode`: K code tensors (B, ph * pw) int64 of images in [-1, 1], coarse to fine, row-major."""
        return self.encode(inp_img_no_grad, v_patch_nums)

    @torch.no_grad()
    def idxBl_to_img(self, ms_idx_Bl: list[torch.Tensor], same_shape: bool,
                     last_one: bool = False) -> list[torch.Tensor] | torch.Tensor:
        """Images in [-1, 1] after each (or the last) scale; image k at scale k's size unless `same_shape`."""
        sides = [round(idx_Bl.shape[1] ** 0.5) for idx_Bl in ms_idx_Bl]
        ms_h_BZhw = [self.quantize.embed(idx_Bl, (pn, pn))
                     for idx_Bl, pn in zip(ms_idx_Bl, sides, strict=True)]
        return self.embed_to_img(ms_h_BZhw, all_to_max_scale=same_shape, last_one=last_one)

    def embed_to_img(self, ms_h_BChw: list[torch.Tensor], all_to_max_scale: bool,
                     last_one: bool = False) -> list[torch.Tensor] | torch.Tensor:
        """As `idxBl_to_img`, from embedding maps (B, Z, pn, pn)."""
        f_hat = self.quantize.embed_to_fhat(ms_h_BChw, all_to_max_scale=all_to_max_scale, last_one=last_one)
        return self.fhat_to_img(f_hat) if last_one else [self.fhat_to_img(f) for f in f_hat]

    @torch.no_grad()
    def img_to_reconstructed_img(self, x: torch.Tensor, v_patch_nums: Sequence[Side] | None = None,
                                 last_one: bool = False) -> list[torch.Tensor] | torch.Tensor:
        """Reconstructions in [-1, 1] after each scale (or after the last)."""
        f_hats = self.quantize.f_to_idxBl_or_fhat(self.features(x), to_fhat=True, v_patch_nums=v_patch_nums)
        return self.fhat_to_img(f_hats[-1]) if last_one else [self.fhat_to_img(f) for f in f_hats]

    # ------------------------------------------------------------------------------ training
    def forward(self, inp: torch.Tensor, ret_usages: bool = False,
                ) -> tuple[torch.Tensor, list[float] | None, torch.Tensor]:
        """(reconstruction, not clamped; usage in percent per scale or None; quantizer loss)."""
        f_hat, usages, vq_loss = self.quantize(self.features(inp), ret_usages=ret_usages)
        return self.decoder(self.post_quant_conv(f_hat)), usages, vq_loss

    def training_loss(self, images_B3HW: torch.Tensor, label_B: torch.Tensor,
                      progress: float = 1.) -> tuple[torch.Tensor, dict[str, Any]]:
        """Pixel loss plus quantizer loss; labels are not used."""
        rec_B3HW, _, vq_loss = self(images_B3HW)
        rec_loss = L1_WEIGHT * F.l1_loss(rec_B3HW.float(), images_B3HW) \
            + L2_WEIGHT * F.mse_loss(rec_B3HW.float(), images_B3HW)
        return rec_loss + vq_loss, dict(images=images_B3HW, rec=rec_B3HW.detach().float(),
                                        rec_loss=rec_loss.detach(), vq_loss=vq_loss.detach())

    def metrics(self, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """rec_loss, vq_loss, psnr in dB (clamped images, per image), and `usages` per scale side."""
        error_B = (aux['rec'].clamp(-1, 1) - aux['images']).div(2).square().flatten(1).mean(1)
        usages = self.quantize.usages(aux['images'][:, 0].numel() // self.stride ** 2)
        sides = self.quantize.v_patch_nums
        return dict(rec_loss=aux['rec_loss'], vq_loss=aux['vq_loss'],
                    psnr=-10 * error_B.clamp_min(1e-10).log10().mean(),
                    usage_last=torch.tensor(usages[-1], device=error_B.device),
                    **{f'usage_{side}': torch.tensor(u, device=error_B.device)
                       for side, u in zip(sides, usages, strict=True)})

    def after_step(self, progress: float) -> None:
        if self.quantize.codebook is not None:
            self.quantize.codebook.update(progress)

    def config_state(self, progress: float) -> dict[str, Any]:
        return dict(v_patch_nums=list(self.quantize.v_patch_nums))

    def training_state(self) -> dict[str, Any]:
        codebook = self.quantize.codebook
        return dict(record_hit=self.quantize.record_hit, codebook=codebook.state_dict() if codebook else None)

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.quantize.record_hit = state['record_hit']
        if self.quantize.codebook is not None:
            self.quantize.codebook.load_state_dict(state['codebook'])

    # ------------------------------------------------------------------------------ weights
    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As torch's, but without usage counters of another number of scales; `state_dict` stays as it is."""
        key = 'quantize.ema_vocab_hit_SV'
        mine = self.quantize.ema_vocab_hit_SV
        if key in state_dict and len(state_dict[key]) != len(mine):
            state_dict = {**state_dict, key: mine}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Everything but the pyramid, which is no part of the weights."""
        ch = state['encoder.conv_in.weight'].shape[0]
        num_levels = 1 + max(int(key.split('.')[2]) for key in state if key.startswith('encoder.down.'))
        widths = [state[f'encoder.down.{i}.block.0.conv1.weight'].shape[0] for i in range(num_levels)]
        vocab_size, z_channels = state['quantize.embedding.weight'].shape
        shared = [key for key in state
                  if key.startswith('quantize.quant_resi.qresi_ls.') and key.endswith('.weight')]
        blocks = {key.split('.')[4] for key in state if key.startswith('encoder.down.0.block.')}
        return dict(vocab_size=vocab_size, z_channels=z_channels, ch=ch,
                    ch_mult=tuple(w // ch for w in widths), num_res_blocks=len(blocks),
                    quant_conv_ks=state['quant_conv.weight'].shape[-1],
                    share_quant_resi=len(shared) or int('quantize.quant_resi.qresi.weight' in state))
