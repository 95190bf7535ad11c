"""VQModel: an image as one map of codes (VQ-16, VQ-8).

Letters: B batch, l tokens of one map, Z code channels, V vocabulary, N queries of a map, h w map, 3HW image.
Source: arXiv 2406.06525 (LlamaGen), under the names of its weights.
"""
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.base import Reconstruction, Tokenizer, at_least_float32
from models.scales import scale_name
from models.tokenizers.codebook import CodebookUpkeep, squared_distances
from models.tokenizers.conv import (
    LLAMAGEN_LAYOUT,
    build_encoder_decoder,
    in_float32,
    init_convolutions,
    read_ch_mult,
    read_encoder_decoder,
)

HISTORY = 65536      # latest codes that the published usage figure looks at
TEMPERATURE = 0.01   # of the entropy loss

Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]  # vq, commit, entropy, usage


def entropy_loss(affinity_NV: torch.Tensor) -> torch.Tensor:
    """Mean entropy of every query's code distribution minus the entropy of their mean.

    It is low when each query is sure of its code and all codes are used alike.
    """
    scaled_NV = affinity_NV / TEMPERATURE
    p_NV = scaled_NV.softmax(1)
    log_p_NV = scaled_NV.log_softmax(1)
    p_V = p_NV.mean(0)
    entropy_of_mean = -(p_V * (p_V + 1e-5).log()).sum()
    mean_entropy = -(p_NV * log_p_NV).sum(1).mean()
    return mean_entropy - entropy_of_mean


def area_resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mean over the cells of a grid of `size`, which need not divide the sides of x (B, C, h, w)."""
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode='area')


class Quantised(NamedTuple):
    """A feature map after the quantizer."""
    quant_BZhw: torch.Tensor    # vectors of its codes; their gradient goes to the queries unchanged
    idx_Bl: torch.Tensor        # codes, int64, row by row
    query_NZ: torch.Tensor      # what was compared with the codes
    vq_loss: torch.Tensor       # pulls the codes to the queries
    commit_loss: torch.Tensor   # pulls the queries to the codes
    entropy_loss: torch.Tensor  # see `entropy_loss`

    @property
    def loss(self) -> torch.Tensor:
        """What the quantizer adds to the training loss."""
        return self.vq_loss + self.commit_loss + self.entropy_loss


class VectorQuantizer(nn.Module):
    """One codebook for one map; computes in float32 (or float64) whatever autocast says.

    Args:
        vocab_size: V. channels: Z.
        beta: weight of the commitment loss.
        entropy_ratio: weight of the entropy loss, 0 is off.
        l2_norm: queries and codes count by their direction; stored codes need not have unit length.
    """

    def __init__(self, vocab_size: int, channels: int, beta: float = 0.25, entropy_ratio: float = 0.,
                 l2_norm: bool = True):
        super().__init__()
        self.vocab_size = vocab_size
        self.channels = channels
        self.beta = beta
        self.entropy_ratio = entropy_ratio
        self.l2_norm = l2_norm
        # part of the published weights; it starts as if code 0 had been used throughout
        self.register_buffer('codebook_used', torch.zeros(HISTORY))
        self.embedding = nn.Embedding(vocab_size, channels)

    def unit(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of unit length where the mode asks for it."""
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def queries(self, z_BZhw: torch.Tensor) -> torch.Tensor:
        """(N, Z) in the order of image, row, column."""
        return self.unit(at_least_float32(z_BZhw).permute(0, 2, 3, 1).reshape(-1, self.channels))

    def distances(self, query_NZ: torch.Tensor) -> torch.Tensor:
        """(N, V) squared distances between queries and codes."""
        table_VZ = self.unit(self.embedding.weight)
        return squared_distances(query_NZ, table_VZ)

    @torch.no_grad()
    def codes(self, z_BZhw: torch.Tensor) -> torch.Tensor:
        """(B, l) int64, the nearest code of every position, row by row; the first one on ties."""
        with torch.autocast(z_BZhw.device.type, enabled=False):
            return self.distances(self.queries(z_BZhw)).argmin(1).view(len(z_BZhw), -1)

    def embed(self, idx: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B, Z, *size) of codes in any shape with B * h * w elements."""
        code_BhwZ = self.unit(self.embedding(idx)).reshape(-1, *size, self.channels)
        return code_BhwZ.permute(0, 3, 1, 2).contiguous()

    def get_codebook_entry(self, indices: torch.Tensor, shape: Sequence[int] | None = None,
                           channel_first: bool = True) -> torch.Tensor:
        """Vectors (N, Z) of codes, or in `shape`: (B, Z, h, w), or (B, h, w, Z) without `channel_first`."""
        if shape is None:
            return self.unit(self.embedding(indices))
        height, width = shape[2:] if channel_first else shape[1:3]
        code_BZhw = self.embed(indices, (height, width))
        return code_BZhw if channel_first else code_BZhw.permute(0, 2, 3, 1)

    def forward(self, z_BZhw: torch.Tensor) -> Quantised:
        """Quantise with gradients and losses; in training mode the codes also enter `codebook_used`."""
        with torch.autocast(z_BZhw.device.type, enabled=False):
            B, _, h, w = z_BZhw.shape
            query_NZ = self.queries(z_BZhw)                                                # (N, Z)
            # Distances need a gradient for the entropy loss alone, and take the most memory of all.
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.entropy_ratio != 0):
                distance_NV = self.distances(query_NZ)                                     # (N, V)
            idx_N = distance_NV.argmin(1)
            code_NZ = self.unit(self.embedding(idx_N))

            # The published usage figure looks at the latest codes.
            if self.training:
                seen = torch.cat([self.codebook_used, idx_N.to(self.codebook_used)])
                self.codebook_used.copy_(seen[-HISTORY:])

            # Straight through: the decoder sees the codes, and their gradient goes to the queries.
            quant_NZ = query_NZ + (code_NZ - query_NZ).detach()
            entropy = query_NZ.new_zeros(())
            if self.entropy_ratio:
                entropy = self.entropy_ratio * entropy_loss(-distance_NV)
            return Quantised(
                quant_BZhw=quant_NZ.view(B, h, w, -1).permute(0, 3, 1, 2).contiguous(),
                idx_Bl=idx_N.view(B, -1),
                query_NZ=query_NZ,
                vq_loss=F.mse_loss(code_NZ, query_NZ.detach()),
                commit_loss=self.beta * F.mse_loss(code_NZ.detach(), query_NZ),
                entropy_loss=entropy,
            )

    def usage(self) -> float:
        """Distinct codes among the latest 65,536 of this rank / V, as published."""
        return len(self.codebook_used.unique()) / self.vocab_size


class VQModel(Tokenizer):
    """Encoder, quantizer, decoder; the tokens are `idx_BL`, int64 in raster order.

    Args:
        codebook_size: V. codebook_embed_dim: Z.
        codebook_l2_norm, commit_loss_beta, entropy_loss_ratio: see `VectorQuantizer`.
        encoder_ch_mult, decoder_ch_mult: width multiples per level; the stride is 2 ** (levels - 1).
        z_channels: channels of encoder and decoder next to the quantizer.
        dropout_p: inside residual blocks.
        ch: width of the first level, a multiple of 32; num_res_blocks: per encoder level, the decoder has one
            more; net: 'published' or 'tiny', see `build_encoder_decoder`.
        upkeep: arguments of `CodebookUpkeep`; None trains as published, by gradient alone.
        test_mode: eval mode with every parameter frozen, as a generator uses it.
    """

    built_settings = ('codebook_l2_norm',)
    headline = {'rec': 'rec_loss', 'lat': 'latent_loss', 'psnr': 'psnr', 'use': 'usage'}
    legend = ('rec is the loss of the reconstruction, lat that of the codes, psnr the PSNR of the '
              'reconstruction in dB, use the share of the codebook that is used')
    rank_local = frozenset({'quantize.codebook_used'})  # the latest codes of this rank, as published

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        codebook_l2_norm: bool = True,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.,
        encoder_ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        z_channels: int = 256,
        dropout_p: float = 0.,
        ch: int = 128,
        num_res_blocks: int = 2,
        net: str = 'published',
        upkeep: dict[str, Any] | None = None,
        test_mode: bool = False,
    ):
        super().__init__()
        self.vocab_size = codebook_size
        self.Cvae = self.channels = codebook_embed_dim
        self.encoder, self.decoder = build_encoder_decoder(
            net, ch=ch, ch_mult=encoder_ch_mult, decoder_ch_mult=decoder_ch_mult,
            num_res_blocks=num_res_blocks, dropout=dropout_p, z_channels=z_channels, layout=LLAMAGEN_LAYOUT)
        self.stride = self.encoder.stride
        self.quantize = VectorQuantizer(codebook_size, codebook_embed_dim, commit_loss_beta,
                                        entropy_loss_ratio, codebook_l2_norm)
        self.quant_conv = nn.Conv2d(z_channels, codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_embed_dim, z_channels, 1)
        self.upkeep = None if upkeep is None else CodebookUpkeep(self.quantize.embedding, **upkeep)
        self.init_weights()
        if test_mode:
            self.eval().requires_grad_(False)

    @torch.no_grad()
    def init_weights(self, codebook_init: str = 'uniform') -> None:
        """Sane values even where a caller switched off the layers' own `reset_parameters`.

        Args:
            codebook_init: 'uniform' (or 'inv_v', the same here) in +-1 / V as published, 'normal' N(0, 1);
                in l2 mode the codes are then brought to unit length.
        """
        init_convolutions(self)
        weight_VZ = self.quantize.embedding.weight
        if codebook_init == 'normal':
            nn.init.normal_(weight_VZ)
        else:
            nn.init.uniform_(weight_VZ, -1 / self.vocab_size, 1 / self.vocab_size)
        weight_VZ.copy_(self.quantize.unit(weight_VZ))

    # ------------------------------------------------------------------------------ inference
    def features(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, Z, h, w) in float32, what the quantizer sees."""
        return in_float32(self.quant_conv, self.encoder(images_B3HW))

    encode_conti = features  # its published name

    def pixels(self, quant_BZhw: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in float32 of quantised features, not clamped."""
        return at_least_float32(self.decoder(in_float32(self.post_quant_conv, quant_BZhw)))

    def _encode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return self.quantize.codes(self.features(images_B3HW))

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] of codes (B, l).

        Args:
            size: rows and columns of the map; None means a square one.
        Raises:
            ValueError: the codes do not fill a map of this size.
        """
        length = tokens.shape[1]
        height, width = size or (math.isqrt(length),) * 2
        if height * width != length:
            raise ValueError(f'expected {height}x{width} codes per image, got {length}: '
                             'pass size=(rows, columns) of the map')
        return self.pixels(self.quantize.embed(tokens, (height, width))).clamp_(-1, 1)

    def decode_code(self, codes: torch.Tensor, shape: Sequence[int],
                    channel_first: bool = True) -> torch.Tensor:
        """Images, not clamped, of codes, flat or (B, l); `shape` as for `get_codebook_entry`."""
        code = self.quantize.get_codebook_entry(codes, shape, channel_first)
        return self.pixels(code if channel_first else code.permute(0, 3, 1, 2))

    def progressive(self, images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        size = self.native_size(images_B3HW)
        return {scale_name(size): self.decode(self.encode(images_B3HW), size)}

    def native_size(self, images_B3HW: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of the finest code map of these images."""
        return images_B3HW.shape[-2] // self.stride, images_B3HW.shape[-1] // self.stride

    # ------------------------------------------------------------------------------ training
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Losses]:
        """(reconstruction, not clamped; losses and usage), as published but with losses in eval mode too."""
        out = self.quantize(self.features(x))
        return self.pixels(out.quant_BZhw), self.losses(out)

    def losses(self, out: Quantised) -> Losses:
        """Those of the quantizer and its usage, in the published order."""
        return out.vq_loss, out.commit_loss, out.entropy_loss, self.quantize.usage()

    def training_sizes(self, native: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes of the code maps of one training or validation step, the native one last."""
        return [native]

    def reconstruct(self, images_B3HW: torch.Tensor, progress: float = 1.) -> Reconstruction:
        self.check_size(images_B3HW)
        # The same features are quantised and decoded at every size of the step, each a complete image.
        f_BZhw = self.features(images_B3HW)
        views = []
        maps = {}
        for h, w in self.training_sizes(self.native_size(images_B3HW)):
            out = self.quantize(area_resize(f_BZhw, (h, w)))
            maps[scale_name((h, w))] = out
            target_B3hw = area_resize(images_B3HW, (h * self.stride, w * self.stride))
            views.append((target_B3hw, self.pixels(out.quant_BZhw)))

        codes = {name: out.idx_Bl for name, out in maps.items()}
        if self.training and self.upkeep is not None:
            queries = {name: out.query_NZ for name, out in maps.items()}
            self.upkeep.observe(codes, queries)

        # Every size counts the same in the loss of the quantizer.
        parts = {}
        for name in ('vq_loss', 'commit_loss', 'entropy_loss'):
            parts[name] = torch.stack([getattr(out, name) for out in maps.values()]).mean()
        latent_loss = sum(parts.values())
        if len(views) > 1:
            for name, (target_B3hw, rec_B3hw) in zip(maps, views, strict=True):
                parts[f'l2_{name}'] = F.mse_loss(rec_B3hw, target_B3hw)
        parts |= dict(latent_mean=f_BZhw.mean(), latent_std=f_BZhw.std())
        parts = {name: value.detach() for name, value in parts.items()}
        return Reconstruction(views, latent_loss, parts, codes)

    def after_step(self, progress: float) -> dict[nn.Parameter, torch.Tensor]:
        return {} if self.upkeep is None else self.upkeep.update(progress)

    def forget_step(self) -> None:
        if self.upkeep is not None:
            self.upkeep.forget()

    def code_metrics(self) -> dict[str, float]:
        return {} if self.upkeep is None else self.upkeep.metrics()

    def code_counts(self) -> dict[str, torch.Tensor]:
        return {} if self.upkeep is None else self.upkeep.counts()

    def no_weight_decay(self) -> set[str]:
        return {'quantize.embedding'}

    def training_state(self) -> dict[str, Any]:
        return {} if self.upkeep is None else dict(upkeep=self.upkeep.state_dict())

    def load_training_state(self, state: dict[str, Any]) -> None:
        if self.upkeep is not None:
            self.upkeep.load_state_dict(state['upkeep'])

    # ------------------------------------------------------------------------------ weights
    def config_state(self, progress: float) -> dict[str, Any]:
        """Constructor arguments that the weights do not tell."""
        quantize = self.quantize
        return dict(codebook_l2_norm=quantize.l2_norm, commit_loss_beta=quantize.beta,
                    entropy_loss_ratio=quantize.entropy_ratio)

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Everything but `config_state` and what matters in training only."""
        kwargs = read_encoder_decoder(state)
        encoder_ch_mult = kwargs.pop('ch_mult')
        vocab_size, channels = state['quantize.embedding.weight'].shape
        return kwargs | dict(
            codebook_size=vocab_size,
            codebook_embed_dim=channels,
            encoder_ch_mult=encoder_ch_mult,
            decoder_ch_mult=read_ch_mult(state, 'decoder'),
            z_channels=state['quant_conv.weight'].shape[1],
        )


def VQ_16(**kwargs: Any) -> VQModel:
    """A code for every 16x16 pixels; `kwargs` are those of `VQModel`."""
    return VQModel(encoder_ch_mult=(1, 1, 2, 2, 4), decoder_ch_mult=(1, 1, 2, 2, 4), **kwargs)


def VQ_8(**kwargs: Any) -> VQModel:
    """A code for every 8x8 pixels; `kwargs` are those of `VQModel`."""
    return VQModel(encoder_ch_mult=(1, 2, 2, 4), decoder_ch_mult=(1, 2, 2, 4), **kwargs)


VQ_models = {'VQ-16': VQ_16, 'VQ-8': VQ_8}
