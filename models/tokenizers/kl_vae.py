"""AutoencoderKL (KL-16): an image as a continuous latent of nearly unit variance.

Letters: B batch, Z latent channels, h w feature map, 3HW image.
Source: KL-f16 of arXiv 2112.10752, as changed and published with arXiv 2406.11838 (MAR).
"""
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

import dist
from models.base import Reconstruction, Tokenizer, at_least_float32, load_weights
from models.noise import GlobalBatch
from models.tokenizers.conv import (
    KL_LAYOUT,
    build_encoder_decoder,
    in_float32,
    init_convolutions,
    read_encoder_decoder,
    start_as_identity,
)

logger = logging.getLogger(__name__)

DEAD_CHANNEL = 0.01      # nats per position: a channel below it carries nothing
FIRST_LOGVAR = -4.       # of the posterior
ALARM_AFTER = 0.05       # share of the training before which no channel is called dead


class Posterior:
    """A normal distribution for every latent value, or a single point where there is no `logvar_BZhw`.

    Args:
        mean_BZhw, logvar_BZhw: float32; the logarithm of the variance is clamped to [-30, 20].
    """

    def __init__(self, mean_BZhw: torch.Tensor, logvar_BZhw: torch.Tensor | None = None):
        self.mean = mean_BZhw
        self.logvar = None if logvar_BZhw is None else logvar_BZhw.clamp(-30, 20)

    @property
    def std(self) -> torch.Tensor:
        return torch.zeros_like(self.mean) if self.logvar is None else self.logvar.mul(0.5).exp()

    def sample(self, noise_BZhw: torch.Tensor | None = None) -> torch.Tensor:
        """mean + std * noise; None draws normal noise for each image from the global generator."""
        if self.logvar is None:
            return self.mean
        if noise_BZhw is None:
            noise_BZhw = GlobalBatch.current.per_image(
                len(self.mean), self.mean.device, lambda t: t.normal_(), self.mean.shape[1:])
        return self.mean + self.std * noise_BZhw

    def mode(self) -> torch.Tensor:
        return self.mean

    def elementwise_kl(self) -> torch.Tensor:
        """Divergence (B, Z, h, w) from N(0, 1) in nats; 0 for a single point."""
        if self.logvar is None:
            return torch.zeros_like(self.mean)
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)

    def kl(self) -> torch.Tensor:
        """Divergence (B,) from the unit normal in nats, summed over each latent."""
        return self.elementwise_kl().flatten(1).sum(1)


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """The flat weights in a file of torch, on the CPU; they may be under 'model', as published ones are.

    Raises:
        ValueError: the file cannot be read, or holds anything but tensors by name.
    """
    wanted = f'expected a file of weights of torch, cannot read {path!r}'
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise ValueError(f'{wanted} ({error.strerror or error}): check the path') from None
    except Exception as error:  # foreign bytes make the unpickler raise anything
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f'{wanted} ({reason}): download it again, or pass another file') from None
    state = content.get('model', content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f'{wanted}: it holds something else than tensors by name; pass the file of the '
                         'weights alone')
    return state


class AutoencoderKL(Tokenizer):
    """Encoder, normal posterior, decoder; the tokens are `latent_BZhw`, a scaled sample of the posterior.

    Args:
        embed_dim: Z.
        ch_mult: width multiples per level; the stride is 2 ** (levels - 1).
        use_variational: False is a plain autoencoder without noise and divergence.
        ckpt_path: file of published weights to load.
        ch: width of the first level, a multiple of 32; num_res_blocks: per encoder level, the decoder has one
            more; net: 'published' or 'tiny', see `build_encoder_decoder`.
        decoder_attn: attention at the decoder's deepest level, which published weights lack.
        scaling_factor: what samples are multiplied with to give latents; see `calibrate`.
        kl_weight: of the divergence per summed nat, in a loss that sums over pixels too.
        latent_mean, latent_std: of every channel of unscaled samples; measured by `calibrate`.
        test_mode: eval mode with every parameter frozen, as a generator uses it.
    """

    headline = {'rec': 'rec_loss', 'lat': 'latent_loss', 'psnr': 'psnr', 'kl': 'kl'}
    vocab_size = None
    needs_calibration = True

    def __init__(self, embed_dim: int = 16, ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
                 use_variational: bool = True, ckpt_path: str | None = None, ch: int = 128,
                 num_res_blocks: int = 2, decoder_attn: bool = False, scaling_factor: float = 0.2325,
                 kl_weight: float = 1e-6, net: str = 'published',
                 latent_mean: Sequence[float] | None = None, latent_std: Sequence[float] | None = None,
                 test_mode: bool = False):
        super().__init__()
        self.channels = embed_dim
        self.use_variational = use_variational
        self.kl_weight = kl_weight
        self.scaling_factor = scaling_factor
        self.latent_mean = latent_mean
        self.latent_std = latent_std
        self.kl_Z: torch.Tensor | None = None  # of the last step, in nats; None before the alarm is on
        self.dead_channels: list[int] = []
        num_moments = 2 * embed_dim if use_variational else embed_dim
        self.encoder, self.decoder = build_encoder_decoder(
            net, ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, z_channels=embed_dim,
            encoder_channels=num_moments, decoder_attn=decoder_attn, layout=KL_LAYOUT)
        self.stride = self.encoder.stride
        self.quant_conv = nn.Conv2d(num_moments, num_moments, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        self.init_weights()
        if ckpt_path is not None:
            load_weights(self, read_weights(ckpt_path), repr(ckpt_path))
        if test_mode:
            self.eval().requires_grad_(False)

    def init_weights(self) -> None:
        """Sane values even where a caller switched off the layers' own `reset_parameters`.

        The posterior starts narrow: at unit width its noise would drown the small first latents.
        """
        init_convolutions(self)
        start_as_identity(self.quant_conv, self.post_quant_conv)
        if self.use_variational:
            nn.init.constant_(self.encoder.conv_out.bias[self.channels:], FIRST_LOGVAR)

    # ------------------------------------------------------------------------------ inference
    def moments(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Means and log-variances (B, 2 Z, h, w) of the unscaled latent, in float32 under any autocast."""
        return in_float32(self.quant_conv, self.encoder(images_B3HW))

    @torch.no_grad()
    def precompute(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The moments: a latent is drawn from them anew whenever `encode` takes them."""
        self.check_size(images_B3HW)
        return self.moments(images_B3HW)

    def posterior(self, images_B3HW: torch.Tensor) -> Posterior:
        """Distribution of the unscaled latent."""
        return self._posterior(self.moments(images_B3HW))

    def _posterior(self, moments: torch.Tensor) -> Posterior:
        return Posterior(*moments.chunk(2, dim=1)) if self.use_variational else Posterior(moments)

    def encode(self, images_B3HW: torch.Tensor, *args) -> torch.Tensor:
        """As `Tokenizer.encode`; takes `moments` that were stored in the place of images, too."""
        if images_B3HW.shape[1] == self.quant_conv.out_channels:
            return self.scaling_factor * self._posterior(images_B3HW.float()).sample()
        return super().encode(images_B3HW, *args)

    def _encode(self, images_B3HW: torch.Tensor, mode: bool = False) -> torch.Tensor:
        posterior = self.posterior(images_B3HW)
        return self.scaling_factor * (posterior.mode() if mode else posterior.sample())

    def encode_mode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """As `encode`, but the posterior's mean instead of a sample."""
        return self.encode(images_B3HW, True)

    def pixels(self, z_BZhw: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in float32 of unscaled latents, not clamped."""
        return at_least_float32(self.decoder(in_float32(self.post_quant_conv, z_BZhw)))

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] of scaled latents (B, Z, h, w)."""
        return self.pixels(tokens / self.scaling_factor).clamp_(-1, 1)

    def progressive(self, images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        latent_BZhw = self.encode_mode(images_B3HW)
        return {f'{latent_BZhw.shape[2]}x{latent_BZhw.shape[3]}': self.decode(latent_BZhw)}

    # ------------------------------------------------------------------------------ training
    def reconstruct(self, images_B3HW: torch.Tensor, progress: float = 1.) -> Reconstruction:
        """As `Tokenizer`; the divergence has the weight kl_weight / 3HW, as pixel losses are means here."""
        self.check_size(images_B3HW)
        posterior = self.posterior(images_B3HW)
        rec_B3HW = self.pixels(posterior.sample() if self.training else posterior.mode())
        kl = posterior.kl().mean()
        with torch.no_grad():
            kl_Z = posterior.elementwise_kl().mean((0, 2, 3))
            self.kl_Z = kl_Z if self.use_variational and progress > ALARM_AFTER else None
            parts = dict(kl=kl.detach(), posterior_std=posterior.std.mean(),
                         alarm_collapse=(kl_Z.min() < DEAD_CHANNEL).float() * (self.kl_Z is not None))
            parts |= {f'kl_channel_{c}': kl_Z[c] for c in range(self.channels)}
        latent_loss = self.kl_weight / images_B3HW[0].numel() * kl
        return Reconstruction([(images_B3HW, rec_B3HW)], latent_loss, parts, {})

    @torch.no_grad()
    def calibrate(self, batches: Iterable[torch.Tensor]) -> None:
        """Set scaling_factor = 1 / std of samples, and mean and std of every channel, from training images.

        The law of samples is known (their second moment is mean^2 + std^2), so none is drawn.

        Args:
            batches: images (B, 3, H, W) in [-1, 1] of this rank; every rank calls it, all count.
        Raises:
            ValueError: no rank has an image.
        """
        device = self.quant_conv.weight.device
        sums = torch.zeros(3, self.channels, dtype=torch.float64, device=device)  # of 1, z, z^2
        with torch.autocast(device.type, enabled=False):
            for images_B3HW in batches:
                posterior = self.posterior(at_least_float32(images_B3HW.to(device)))
                mean = posterior.mean.double()
                var = posterior.std.double().square()
                moments = torch.stack([torch.ones_like(mean), mean, mean.square() + var])
                sums += moments.sum((1, 3, 4))
        dist.allreduce(sums)
        if not sums[0].all():
            raise ValueError('calibration needs at least one image, got none: pass training images')
        count_Z, sum_Z, square_Z = sums
        self.latent_mean = (sum_Z / count_Z).tolist()
        self.latent_std = (square_Z / count_Z - (sum_Z / count_Z).square()).sqrt().tolist()
        mean = sum_Z.sum() / count_Z.sum()
        square = square_Z.sum() / count_Z.sum()
        self.scaling_factor = (square - mean.square()).rsqrt().item()

    def code_metrics(self) -> dict[str, float]:
        """Nothing beside the parts of a reconstruction; a warning names channels that have just died."""
        dead = [] if self.kl_Z is None else (self.kl_Z < DEAD_CHANNEL).nonzero().flatten().tolist()
        if set(dead) - set(self.dead_channels) and dist.is_master():
            logger.warning('latent channels %s carry nothing: their divergence is below %g nats', dead,
                           DEAD_CHANNEL)
        self.dead_channels = dead
        return {}

    def training_state(self) -> dict[str, Any]:
        return dict(scaling_factor=self.scaling_factor, latent_mean=self.latent_mean,
                    latent_std=self.latent_std)

    def load_training_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    # ------------------------------------------------------------------------------ weights
    def config_state(self, progress: float) -> dict[str, Any]:
        """Constructor arguments that the weights do not tell."""
        return self.training_state() | dict(kl_weight=self.kl_weight)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As torch's, without the loss network that published files may hold; `state_dict` stays as it is."""
        weights = {key: t for key, t in state_dict.items() if not key.startswith('loss.')}
        return super().load_state_dict(weights, strict=strict, assign=assign)

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Everything but `config_state`."""
        if 'quantize.embedding.weight' in state:
            raise ValueError('they have a codebook')
        embed_dim = state['post_quant_conv.weight'].shape[0]
        return dict(embed_dim=embed_dim, use_variational=len(state['quant_conv.weight']) == 2 * embed_dim,
                    decoder_attn=any(key.startswith('decoder.up.') and '.attn.' in key for key in state),
                    **read_encoder_decoder(state))
